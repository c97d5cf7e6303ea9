"""The gradients of Mamba-2's scan that are no products: of the steps and their decays, and of what is added to outputs.

The gradient of the logarithm of a decay is the sum of what crosses it: of dout_t (what was read at t of what entered
at s) over all s before the decay and all t from it on, where the states before the chunk enter before its first step
and what reaches its end is read after its last. As a difference of two sums, over all t and over all s, it would nearly
cancel where states are short-lived.
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.selective_scan_tiles import states_if
from ssmtune.triton_kernels.ssd_scan_chunks import (
    bounds_of_row,
    decays_between,
    decays_to_end,
    load_tile,
    locate_chunk,
    product,
    rows_of,
)


@triton.jit(do_not_specialize=["seqlen", "n_rows", "n_chunks"])
def ssd_decays_kernel(
    # sequences [batch, seqlen, nheads, HEADDIM] twice, [batch, seqlen, groups, DSTATE] twice
    x_ptr, dout_ptr, B_ptr, C_ptr,
    # [chunks, nheads, CHUNK]
    steps_ptr, high_ptr, low_ptr,
    # [chunks, nheads, HEADDIM, DSTATE]: before and after each chunk
    states_ptr, adjoints_ptr,
    cu_seqlens_ptr,
    # partial sums [blocks of HEADDIM, tiles, chunks, nheads, CHUNK]
    dsteps_ptr, ddecays_ptr,
    seqlen, n_rows, n_chunks, nheads, group_heads,
    stride_x_batch, stride_x_time, stride_dout_batch, stride_dout_time,
    stride_B_batch, stride_B_time, stride_C_batch, stride_C_time,
    HEADDIM: tl.constexpr, DSTATE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P * (CHUNK // TILE)
    i_head = tl.program_id(0) % nheads
    i_part = tl.program_id(0) // nheads % PARTS
    i_chunk = (tl.program_id(0) // (nheads * PARTS)).to(tl.int64)
    i_tile = i_part % (CHUNK // TILE)
    o_p = i_part // (CHUNK // TILE) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_t = i_tile * TILE + tl.arange(0, TILE)
    _, i_b, start, end = locate_chunk(i_chunk, cu_seqlens_ptr, seqlen, n_rows, CHUNK)
    m_t = start + o_t < end
    m_p = o_p < HEADDIM
    head = i_head * HEADDIM
    group = i_head // group_heads * DSTATE
    p_x = rows_of(x_ptr, i_b, start, o_t, stride_x_batch, stride_x_time, head)
    p_dout = rows_of(dout_ptr, i_b, start, o_t, stride_dout_batch, stride_dout_time, head)
    p_B = rows_of(B_ptr, i_b, start, o_t, stride_B_batch, stride_B_time, group)
    p_C = rows_of(C_ptr, i_b, start, o_t, stride_C_batch, stride_C_time, group)
    state = (i_chunk * nheads + i_head) * (HEADDIM * DSTATE)

    # [TILE, BLOCK_P]: C_t h and B_t E, with the states before the chunk and the adjoints after it
    b_read = tl.zeros([TILE, BLOCK_P], tl.float32)
    b_left = tl.zeros([TILE, BLOCK_P], tl.float32)
    through = 0.0
    for n in range(0, DSTATE, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        o_state = o_p[None, :] * DSTATE + o_n[:, None]
        m_state = m_p[None, :] & (o_n < DSTATE)[:, None]
        b_state = tl.load(states_ptr + state + o_state, mask=m_state, other=0.0)
        b_adjoint = tl.load(adjoints_ptr + state + o_state, mask=m_state, other=0.0)
        through += tl.sum(b_state * b_adjoint)
        b_read = product(load_tile(p_C, o_n, m_t, DSTATE, OPERAND), b_state, b_read, OPERAND, PRECISION)
        b_left = product(load_tile(p_B, o_n, m_t, DSTATE, OPERAND), b_adjoint, b_left, OPERAND, PRECISION)

    vectors = (i_chunk * nheads + i_head) * CHUNK
    b_high = tl.load(high_ptr + vectors + o_t)
    b_low = tl.load(low_ptr + vectors + o_t)
    b_steps = tl.load(steps_ptr + vectors + o_t)
    through *= tl.where(i_tile == 0, tl.exp2(tl.load(high_ptr + vectors + CHUNK - 1)), 0.0)
    # [TILE]: what is read at o_t of the states before the chunk, and left at its end of what enters at o_t
    b_dout = load_tile(p_dout, o_p, m_t, HEADDIM, tl.float32)
    b_first = tl.exp2(b_high) * tl.sum(b_dout * b_read, axis=1)
    b_last = decays_to_end(b_high, b_low, high_ptr + vectors, low_ptr + vectors, CHUNK)
    b_last *= tl.sum(load_tile(p_x, o_p, m_t, HEADDIM, tl.float32) * b_left, axis=1)

    part = i_part * tl.cast(n_chunks, tl.int64) * nheads * CHUNK + vectors
    tl.store(ddecays_ptr + part, tl.sum(b_first) + through)
    # read at o_t of what enters before o_s
    b_crossing = b_first
    for s in range(0, CHUNK, TILE):
        o_s = s + tl.arange(0, TILE)
        p_dsteps = dsteps_ptr + part + o_s
        p_ddecays = ddecays_ptr + part + 1 + o_s
        m_after = o_s < CHUNK - 1
        if s > i_tile * TILE:
            tl.store(p_dsteps, tl.zeros([TILE], tl.float32))
            tl.store(p_ddecays, tl.zeros([TILE], tl.float32) + (tl.sum(b_last * b_steps) + through), mask=m_after)
        else:
            m_s = start + o_s < end
            p_other_x = rows_of(x_ptr, i_b, start, o_s, stride_x_batch, stride_x_time, head)
            p_other_B = rows_of(B_ptr, i_b, start, o_s, stride_B_batch, stride_B_time, group)
            b_other_x = load_tile(p_other_x, o_p, m_s, HEADDIM, OPERAND)
            # [TILE, TILE]: read at o_t of what enters at o_s
            b_pairs = tl.zeros([TILE, TILE], tl.float32)
            for n in range(0, DSTATE, BLOCK_N):
                o_n = n + tl.arange(0, BLOCK_N)
                b_C = load_tile(p_C, o_n, m_t, DSTATE, OPERAND)
                b_B = load_tile(p_other_B, o_n, m_s, DSTATE, OPERAND)
                b_pairs = product(b_C, tl.trans(b_B), b_pairs, OPERAND, PRECISION)
            b_inputs = tl.zeros([TILE, TILE], tl.float32)
            b_pairs *= product(b_dout, tl.trans(b_other_x), b_inputs, OPERAND, PRECISION)
            b_other_high = tl.load(high_ptr + vectors + o_s)
            b_other_low = tl.load(low_ptr + vectors + o_s)
            b_pairs *= decays_between(b_high, b_low, b_other_high, b_other_low, o_t, o_s, False)
            own = tl.where(o_t[:, None] == o_s[None, :], b_last[:, None], 0.0)
            tl.store(p_dsteps, tl.sum(b_pairs + own, axis=0))
            later = o_t[:, None] > o_s[None, :]
            b_pairs = tl.where(later, b_pairs * tl.load(steps_ptr + vectors + o_s)[None, :], 0.0)
            # what crosses the decay after o_s: read at a later o_t, or left of what has entered at an earlier one
            b_over = tl.where(later, b_crossing[:, None] + tl.cumsum(b_pairs, axis=1), (b_last * b_steps)[:, None])
            tl.store(p_ddecays, tl.sum(b_over, axis=0) + through, mask=m_after)
            b_crossing += tl.sum(b_pairs, axis=1)


@triton.jit(do_not_specialize=["seqlen", "n_pieces", "piece"])
def ssd_offsets_kernel(
    x_ptr, dout_ptr, C_ptr, cu_seqlens_ptr,
    # partial sums [rows, n_pieces, nheads, HEADDIM], with an axis more of DSTATE, and without it again
    dD_ptr, dstate_offset_ptr, doutput_offset_ptr,
    # sizes: pieces of a row, and the steps of one
    seqlen, n_pieces, piece, nheads, group_heads,
    stride_x_batch, stride_x_time, stride_dout_batch, stride_dout_time, stride_C_batch, stride_C_time,
    HEADDIM: tl.constexpr, DSTATE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (DSTATE + BLOCK_N - 1) // BLOCK_N
    P_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    i_block = tl.program_id(0) % (N_BLOCKS * P_BLOCKS)
    i_head = tl.program_id(0) // (N_BLOCKS * P_BLOCKS) % nheads
    i_piece = tl.program_id(0) // (N_BLOCKS * P_BLOCKS * nheads)
    i_row = (i_piece // n_pieces).to(tl.int64)
    begin, end = bounds_of_row(i_row, cu_seqlens_ptr, seqlen)
    i_b = i_row if cu_seqlens_ptr is None else i_row * 0
    o_p = i_block // N_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = i_block % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    start = begin + i_piece % n_pieces * piece
    end = tl.minimum(start + piece, end)
    b_D = tl.zeros([BLOCK_P], tl.float32)
    b_output_offset = tl.zeros([BLOCK_P], tl.float32)
    b_state_offset = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for t in range(start, end, TILE):
        o_t = tl.arange(0, TILE)
        m_t = t + o_t < end
        p_dout = rows_of(dout_ptr, i_b, t, o_t, stride_dout_batch, stride_dout_time, i_head * HEADDIM)
        b_dout = load_tile(p_dout, o_p, m_t, HEADDIM, tl.float32)
        b_output_offset += tl.sum(b_dout, axis=0)
        if dD_ptr is not None:
            p_x = rows_of(x_ptr, i_b, t, o_t, stride_x_batch, stride_x_time, i_head * HEADDIM)
            b_D += tl.sum(b_dout * load_tile(p_x, o_p, m_t, HEADDIM, tl.float32), axis=0)
        if dstate_offset_ptr is not None:
            p_C = rows_of(C_ptr, i_b, t, o_t, stride_C_batch, stride_C_time, i_head // group_heads * DSTATE)
            b_C = load_tile(p_C, o_n, m_t, DSTATE, OPERAND)
            b_state_offset = product(tl.trans(b_dout), b_C, b_state_offset, OPERAND, PRECISION)
    o_head = (i_piece.to(tl.int64) * nheads + i_head) * HEADDIM + o_p
    m_p = states_if(i_block % N_BLOCKS == 0, o_p, HEADDIM)
    if dD_ptr is not None:
        tl.store(dD_ptr + o_head, b_D, mask=m_p)
    if doutput_offset_ptr is not None:
        tl.store(doutput_offset_ptr + o_head, b_output_offset, mask=m_p)
    if dstate_offset_ptr is not None:
        m_state = (o_p < HEADDIM)[:, None] & (o_n < DSTATE)[None, :]
        tl.store(dstate_offset_ptr + o_head[:, None] * DSTATE + o_n[None, :], b_state_offset, mask=m_state)

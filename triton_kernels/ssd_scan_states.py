"""The states between chunks of Mamba-2's scan: what each chunk adds to them, and how they pass from chunk to chunk.

state after a chunk    = (decay of the chunk) (state before it) + sum_s (decay to its end) dt_s x_s B_s^T
adjoint before a chunk = (decay of the chunk) (adjoint after it) + sum_t (decay from its start) dout_t C_t^T
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.ssd_scan_chunks import (
    chunks_of_row,
    decays_to_end,
    load_tile,
    locate_chunk,
    product,
    rows_of,
)


@triton.jit(do_not_specialize=["seqlen", "n_rows"])
def ssd_states_kernel(
    # sequences [batch, seqlen, nheads, HEADDIM] and [batch, seqlen, groups, DSTATE]: x and B, in reverse dout and C
    x_ptr, B_ptr,
    # [chunks, nheads, CHUNK]
    steps_ptr, high_ptr, low_ptr,
    cu_seqlens_ptr,
    # result [chunks, nheads, HEADDIM, DSTATE]
    states_ptr,
    seqlen, n_rows, nheads, group_heads,
    stride_x_batch, stride_x_time, stride_B_batch, stride_B_time,
    REVERSE: tl.constexpr, HEADDIM: tl.constexpr, DSTATE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (DSTATE + BLOCK_N - 1) // BLOCK_N
    P_BLOCKS: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    i_head = tl.program_id(0) % nheads
    i_block = tl.program_id(0) // nheads
    o_p = i_block // N_BLOCKS % P_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = i_block % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    i_chunk = (i_block // (N_BLOCKS * P_BLOCKS)).to(tl.int64)
    _, i_b, start, end = locate_chunk(i_chunk, cu_seqlens_ptr, seqlen, n_rows, CHUNK)
    vectors = (i_chunk * nheads + i_head) * CHUNK
    b_state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for t in range(0, CHUNK, TILE):
        o_t = t + tl.arange(0, TILE)
        m_t = start + o_t < end
        b_high = tl.load(high_ptr + vectors + o_t)
        if REVERSE:
            b_weight = tl.exp2(b_high)
        else:
            b_low = tl.load(low_ptr + vectors + o_t)
            b_weight = decays_to_end(b_high, b_low, high_ptr + vectors, low_ptr + vectors, CHUNK)
            b_weight *= tl.load(steps_ptr + vectors + o_t)
        p_x = rows_of(x_ptr, i_b, start, o_t, stride_x_batch, stride_x_time, i_head * HEADDIM)
        p_B = rows_of(B_ptr, i_b, start, o_t, stride_B_batch, stride_B_time, i_head // group_heads * DSTATE)
        b_x = load_tile(p_x, o_p, m_t, HEADDIM, tl.float32) * b_weight[:, None]
        b_B = load_tile(p_B, o_n, m_t, DSTATE, OPERAND)
        b_state = product(tl.trans(b_x), b_B, b_state, OPERAND, PRECISION)
    p_state = states_ptr + (i_chunk * nheads + i_head) * (HEADDIM * DSTATE) + o_p[:, None] * DSTATE + o_n[None, :]
    tl.store(p_state, b_state, mask=(o_p < HEADDIM)[:, None] & (o_n < DSTATE)[None, :])


@triton.jit(do_not_specialize=["seqlen"])
def ssd_carry_kernel(
    # [chunks, nheads, SIZE], overwritten: from what each chunk adds to the states before them, in reverse after them
    states_ptr,
    # [chunks, nheads, CHUNK]
    high_ptr,
    # [rows, nheads, SIZE]: the states before the first chunk, in reverse after the last; and those at the other end
    first_ptr, last_ptr,
    cu_seqlens_ptr, seqlen, nheads, stride_first,
    REVERSE: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_row = (tl.program_id(0) // (nheads * N_BLOCKS)).to(tl.int64)
    i_head = tl.program_id(0) // N_BLOCKS % nheads
    o_s = tl.program_id(0) % N_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    b_state = tl.zeros([BLOCK], tl.float32)
    if first_ptr is not None:
        b_state = tl.load(first_ptr + i_row * stride_first + i_head * SIZE + o_s, mask=m_s, other=0.0)
    first, n_chunks = chunks_of_row(i_row, cu_seqlens_ptr, seqlen, CHUNK)
    for i in range(n_chunks):
        i_state = (first + (n_chunks - 1 - i if REVERSE else i)) * nheads + i_head
        p_state = states_ptr + i_state * SIZE + o_s
        b_added = tl.load(p_state, mask=m_s, other=0.0)
        tl.store(p_state, b_state, mask=m_s)
        b_state = tl.exp2(tl.load(high_ptr + i_state * CHUNK + CHUNK - 1)) * b_state + b_added
    if last_ptr is not None:
        tl.store(last_ptr + (i_row * nheads + i_head) * SIZE + o_s, b_state, mask=m_s)

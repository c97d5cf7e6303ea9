"""What lets several programs share a row of the selective scan: the state at the start of each of its segments.

First each segment is scanned alone, from a state of zero; then the states are carried over from segment to segment, for

    state after a segment = exp(A sum_t delta_t) (state before it) + (state after it when scanned from zero).

Backward the adjoints go the same way, from the last segment to the first: h_t = a_t h_{t-1} + delta_t B_t u_t becomes
x_{t-1} = a_t (x_t + C_t g_t), with x_t = a_{t+1} G_{t+1}.
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.selective_scan_programs import locate_program
from ssmtune.triton_kernels.selective_scan_tiles import (
    LOG2E,
    by_thread,
    channels_of,
    computed,
    load_delta,
    load_parameter,
    load_tile,
    sigmoid,
    states_if,
    steps_of,
    tile_pointers,
)


@triton.jit(do_not_specialize=["seqlen", "n_rows", "n_segments", "segment"])
def selective_scan_segment_kernel(
    # sequences [batch, dim, seqlen], x being u, or dout in reverse; B, or C in reverse, [batch * groups, seqlen,
    # DSTATE]
    x_ptr, delta_ptr, B_ptr, z_ptr,
    A_ptr, delta_bias_ptr, cu_seqlens_ptr,
    # results [segments, dim, DSTATE] and [segments, dim]: the states, and the sums of the steps' sizes
    states_ptr, sizes_ptr,
    # sizes: as for the forward kernel
    seqlen, dim, group_dim, groups, n_blocks, n_rows, n_segments, segment,
    stride_x_batch, stride_x_dim, stride_x_time,
    stride_delta_batch, stride_delta_dim, stride_delta_time,
    stride_z_batch, stride_z_dim, stride_z_time,
    REVERSE: tl.constexpr, DELTA_SOFTPLUS: tl.constexpr, DSTATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    i_segment, i_row, i_b, i_block, i_group, i_d, begin, end, start, stop = locate_program(
        cu_seqlens_ptr, seqlen, group_dim, groups, n_blocks, n_rows, n_segments, segment, BLOCK_D
    )
    o_n, o_d, m_d, o_nd, m_nd = channels_of(i_block, group_dim, DSTATE, BLOCK_N, BLOCK_D)
    b_A = tl.load(A_ptr + i_d * DSTATE + o_nd, mask=m_nd, other=0.0) * LOG2E
    b_bias = load_parameter(delta_bias_ptr, i_d, o_d, m_d)
    b_state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_size = tl.zeros([BLOCK_D, STEPS], tl.float32)

    o_t = tl.arange(0, STEPS)
    p_x = tile_pointers(x_ptr, i_b, i_d, o_d, stride_x_batch, stride_x_dim, stride_x_time, STEPS)
    p_delta = tile_pointers(delta_ptr, i_b, i_d, o_d, stride_delta_batch, stride_delta_dim, stride_delta_time, STEPS)
    if z_ptr is not None:
        p_z = tile_pointers(z_ptr, i_b, i_d, o_d, stride_z_batch, stride_z_dim, stride_z_time, STEPS)
    # [BLOCK_N]
    p_B = B_ptr + (i_b * groups + i_group) * seqlen * DSTATE + o_n
    FIRST: tl.constexpr = STEPS - 1 if REVERSE else 0
    STRIDE: tl.constexpr = -1 if REVERSE else 1
    n_tiles = (stop - start + STEPS - 1) // STEPS
    for i in range(n_tiles):
        if REVERSE:
            t = start + (n_tiles - 1 - i) * STEPS
        else:
            t = start + i * STEPS
        m_dt = m_d[:, None] & (t + o_t < stop)[None, :]
        # [BLOCK_D, STEPS]
        b_x = load_tile(p_x, t, stride_x_time, m_dt)
        b_delta, _ = load_delta(p_delta, t, stride_delta_time, m_dt, b_bias, DELTA_SOFTPLUS)
        if z_ptr is not None:
            b_z = load_tile(p_z, t, stride_z_time, m_dt)
            b_x *= b_z * sigmoid(b_z)
        if not REVERSE:
            b_x *= b_delta
        b_size += b_delta
        b_delta, b_x = computed(b_delta, b_x)
        delta = steps_of(b_delta, BLOCK_D, STEPS)
        x = steps_of(b_x, BLOCK_D, STEPS)
        for k in tl.static_range(FIRST, STEPS - 1 - FIRST + STRIDE, STRIDE):
            m_B = states_if(t + k < stop, o_n, DSTATE)
            b_B = tl.load(p_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
            b_decay = tl.exp2(delta[k][None, :] * b_A)
            b_input = x[k][None, :] * b_B[:, None]
            if REVERSE:
                b_state = b_decay * (b_state + b_input)
            else:
                b_state = b_decay * b_state + b_input

    tl.store(states_ptr + (i_segment * dim + i_d) * DSTATE + o_nd, b_state, mask=m_nd)
    tl.store(sizes_ptr + i_segment * dim + i_d + o_d, tl.sum(b_size, axis=1), mask=m_d)


@triton.jit(do_not_specialize=["n_segments", "segment"])
def selective_scan_carry_kernel(
    # [segments, dim, DSTATE], overwritten: from the states after the segments scanned from zero to those before them
    states_ptr,
    sizes_ptr, A_ptr,
    # the state before the first segment worked on, or None for zero
    first_ptr,
    cu_seqlens_ptr, dim, n_blocks, n_segments, segment, stride_first,
    REVERSE: tl.constexpr, DSTATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_block = tl.program_id(0) % n_blocks
    i_d = i_block.to(tl.int64) * BLOCK_D
    o_n, o_d, m_d, o_nd, m_nd = channels_of(i_block, dim, DSTATE, BLOCK_N, BLOCK_D)
    first = i_row * n_segments
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + i_row).to(tl.int32)
        first = i_row + begin // segment
        n_segments = tl.cdiv(tl.load(cu_seqlens_ptr + i_row + 1).to(tl.int32) - begin, segment)
    b_A = tl.load(A_ptr + i_d * DSTATE + o_nd, mask=m_nd, other=0.0) * LOG2E
    b_state = load_parameter(first_ptr, i_row * stride_first + i_d * DSTATE, o_nd, m_nd)
    for i in range(n_segments):
        i_segment = first + (n_segments - 1 - i if REVERSE else i)
        p_state = states_ptr + (i_segment * dim + i_d) * DSTATE + o_nd
        b_after = tl.load(p_state, mask=m_nd, other=0.0)
        tl.store(p_state, b_state, mask=m_nd)
        b_size = tl.load(sizes_ptr + i_segment * dim + i_d + o_d, mask=m_d, other=0.0)
        # in two halves, which overflow only where their product with the state does
        b_half = tl.exp2(0.5 * by_thread(b_size, BLOCK_D)[None, :] * b_A)
        b_state = tl.where(b_state == 0.0, 0.0, b_state * b_half * b_half) + b_after

"""The forward kernel of the selective scan.

h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
y_t = C_t (h_t + state_offset) + D u_t + output_offset             [* silu(z_t)]
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.selective_scan_programs import first_chunk_of, locate_program
from ssmtune.triton_kernels.selective_scan_tiles import (
    LOG2E,
    channels_of,
    computed,
    load_delta,
    load_parameter,
    load_tile,
    sigmoid,
    states_if,
    steps_of,
    store_tile,
    tile_of,
    tile_pointers,
)


@triton.jit(do_not_specialize=["seqlen", "n_rows", "n_segments", "segment"])
def selective_scan_fwd_kernel(
    # sequences [batch, dim, seqlen]; B and C [batch * groups, seqlen, DSTATE]
    u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr,
    # parameters [dim, DSTATE] and [dim]; those that are None are left out
    A_ptr, D_ptr, delta_bias_ptr, initial_state_ptr, state_offset_ptr, output_offset_ptr,
    # packed sequences [rows + 1], and the states at the start of each segment [segments, dim, DSTATE]
    cu_seqlens_ptr, segment_states_ptr,
    # results
    out_ptr, last_state_ptr, chunk_states_ptr,
    # sizes: channels of a group, programs side by side in a group, segments of a row where it is not packed, steps of a
    # segment
    seqlen, dim, group_dim, groups, n_blocks, n_rows, n_segments, segment,
    # strides of the sequences
    stride_u_batch, stride_u_dim, stride_u_time,
    stride_delta_batch, stride_delta_dim, stride_delta_time,
    stride_z_batch, stride_z_dim, stride_z_time,
    stride_out_batch, stride_out_dim, stride_out_time,
    # strides between rows, 0 where one row of a parameter serves all
    stride_initial_state, stride_state_offset, stride_output_offset,
    # meta
    DELTA_SOFTPLUS: tl.constexpr, DSTATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    i_segment, i_row, i_b, i_block, i_group, i_d, begin, end, start, stop = locate_program(
        cu_seqlens_ptr, seqlen, group_dim, groups, n_blocks, n_rows, n_segments, segment, BLOCK_D
    )
    first_chunk = first_chunk_of(i_row, begin, cu_seqlens_ptr, seqlen, CHUNK)
    o_n, o_d, m_d, o_nd, m_nd = channels_of(i_block, group_dim, DSTATE, BLOCK_N, BLOCK_D)

    b_A = tl.load(A_ptr + i_d * DSTATE + o_nd, mask=m_nd, other=0.0) * LOG2E
    b_state_offset = load_parameter(state_offset_ptr, i_row * stride_state_offset + i_d * DSTATE, o_nd, m_nd)
    b_D = load_parameter(D_ptr, i_d, o_d, m_d)
    b_bias = load_parameter(delta_bias_ptr, i_d, o_d, m_d)
    b_output_offset = load_parameter(output_offset_ptr, i_row * stride_output_offset + i_d, o_d, m_d)
    if segment_states_ptr is None:
        b_h = load_parameter(initial_state_ptr, i_row * stride_initial_state + i_d * DSTATE, o_nd, m_nd)
    else:
        b_h = tl.load(segment_states_ptr + (i_segment * dim + i_d) * DSTATE + o_nd, mask=m_nd, other=0.0)

    o_t = tl.arange(0, STEPS)
    p_u = tile_pointers(u_ptr, i_b, i_d, o_d, stride_u_batch, stride_u_dim, stride_u_time, STEPS)
    p_delta = tile_pointers(delta_ptr, i_b, i_d, o_d, stride_delta_batch, stride_delta_dim, stride_delta_time, STEPS)
    p_out = tile_pointers(out_ptr, i_b, i_d, o_d, stride_out_batch, stride_out_dim, stride_out_time, STEPS)
    if z_ptr is not None:
        p_z = tile_pointers(z_ptr, i_b, i_d, o_d, stride_z_batch, stride_z_dim, stride_z_time, STEPS)
    # [BLOCK_N]
    o_B = (i_b * groups + i_group) * seqlen * DSTATE + o_n
    for t in range(start, stop, STEPS):
        m_t = t + o_t < stop
        m_dt = m_d[:, None] & m_t[None, :]
        # [BLOCK_D, STEPS]
        b_u = load_tile(p_u, t, stride_u_time, m_dt)
        b_delta, _ = load_delta(p_delta, t, stride_delta_time, m_dt, b_bias, DELTA_SOFTPLUS)
        b_delta, b_delta_u = computed(b_delta, b_delta * b_u)
        delta = steps_of(b_delta, BLOCK_D, STEPS)
        delta_u = steps_of(b_delta_u, BLOCK_D, STEPS)
        y = ()
        for i in tl.static_range(STEPS):
            m_B = states_if(t + i < stop, o_n, DSTATE)
            b_B = tl.load(B_ptr + o_B + (tl.cast(t, tl.int64) + i) * DSTATE, mask=m_B, other=0.0)
            b_C = tl.load(C_ptr + o_B + (tl.cast(t, tl.int64) + i) * DSTATE, mask=m_B, other=0.0)
            # [BLOCK_N, BLOCK_D]
            b_h = tl.exp2(delta[i][None, :] * b_A) * b_h + delta_u[i][None, :] * b_B[:, None]
            if state_offset_ptr is None:
                b_read = b_h
            else:
                b_read = b_h + b_state_offset
            y = y + (tl.sum(b_read * b_C[:, None], axis=0),)
        b_y = tile_of(y, BLOCK_D, STEPS) + b_D[:, None] * b_u + b_output_offset[:, None]
        if z_ptr is not None:
            b_z = load_tile(p_z, t, stride_z_time, m_dt)
            b_y *= b_z * sigmoid(b_z)
        store_tile(p_out, t, stride_out_time, b_y, m_dt)
        if chunk_states_ptr is not None:
            after = t + STEPS - begin
            if (after % CHUNK == 0) & (t + STEPS < end):
                chunk = first_chunk + after // CHUNK - 1
                tl.store(chunk_states_ptr + (chunk * dim + i_d) * DSTATE + o_nd, b_h, mask=m_nd)

    if (stop == end) & (start < end):
        tl.store(last_state_ptr + (i_row * dim + i_d) * DSTATE + o_nd, b_h, mask=m_nd)
        if (chunk_states_ptr is not None) and (cu_seqlens_ptr is not None):
            # a place that the lengths leave empty
            unused = first_chunk + (end - begin - 1) // CHUNK
            if unused < (end - i_row - 1) // CHUNK:
                tl.store(chunk_states_ptr + (unused * dim + i_d) * DSTATE + o_nd, 0.0 * b_h, mask=m_nd)

"""The backward kernel of the selective scan.

With g_t = dout_t silu(z_t), a_t = exp(delta_t A) and G_t = C_t g_t + a_{t+1} G_{t+1}, the adjoint of h_t, each
gradient is a sum over G_t or over g_t, which docs/design.md lists. Chunk by chunk, the last one first, a program runs
forward from the state that the forward kernel kept, AHEAD steps at a time, for the gradients that need no G_t, and
notes what it will need again in `scratch`: the state before every STEPS steps, and what has no state index. Then, from
the last of these tiles on, it runs the STEPS steps forward once more, holding their states in registers, and back.
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.selective_scan_programs import first_chunk_of, locate_program
from ssmtune.triton_kernels.selective_scan_tiles import (
    LN2,
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


@triton.jit(do_not_specialize=["seqlen", "n_rows", "n_segments", "segment", "batch"])
def selective_scan_bwd_kernel(
    # sequences [batch, dim, seqlen]; B and C [batch * groups, seqlen, DSTATE]
    u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr, dout_ptr,
    # parameters [dim, DSTATE] and [dim]; those that are None are left out
    A_ptr, D_ptr, delta_bias_ptr, initial_state_ptr, state_offset_ptr, output_offset_ptr,
    # packed sequences [rows + 1]; states between chunks; adjoints at the end of each segment
    # [segments, dim, DSTATE]
    cu_seqlens_ptr, chunk_states_ptr, adjoint_ptr,
    # room for what a program notes of a chunk
    scratch_ptr,
    # gradients; those that are None are not computed. dB and dC are [n_blocks, batch * groups, seqlen, DSTATE], the
    # others of parameters [segments, ...]: partial sums, one for each program that adds to them
    du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, ddelta_bias_ptr,
    dinitial_state_ptr, dstate_offset_ptr, doutput_offset_ptr,
    # sizes: as for the forward kernel
    batch, seqlen, dim, group_dim, groups, n_blocks, n_rows, n_segments, segment,
    # strides of the sequences
    stride_u_batch, stride_u_dim, stride_u_time,
    stride_delta_batch, stride_delta_dim, stride_delta_time,
    stride_z_batch, stride_z_dim, stride_z_time,
    stride_dout_batch, stride_dout_dim, stride_dout_time,
    stride_du_batch, stride_du_dim, stride_du_time,
    stride_ddelta_batch, stride_ddelta_dim, stride_ddelta_time,
    stride_dz_batch, stride_dz_dim, stride_dz_time,
    # strides between rows, 0 where one row of a parameter serves all
    stride_initial_state, stride_state_offset, stride_output_offset,
    # meta: whether any gradient asked for needs h_t, and whether any needs G_t
    STATES: tl.constexpr, ADJOINTS: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, DSTATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    i_segment, i_row, i_b, i_block, i_group, i_d, begin, end, start, stop = locate_program(
        cu_seqlens_ptr, seqlen, group_dim, groups, n_blocks, n_rows, n_segments, segment, BLOCK_D
    )
    first_chunk = first_chunk_of(i_row, begin, cu_seqlens_ptr, seqlen, CHUNK)
    o_n, o_d, m_d, o_nd, m_nd = channels_of(i_block, group_dim, DSTATE, BLOCK_N, BLOCK_D)

    b_A = tl.load(A_ptr + i_d * DSTATE + o_nd, mask=m_nd, other=0.0) * LOG2E
    b_D = load_parameter(D_ptr, i_d, o_d, m_d)
    b_bias = load_parameter(delta_bias_ptr, i_d, o_d, m_d)
    b_output_offset = load_parameter(output_offset_ptr, i_row * stride_output_offset + i_d, o_d, m_d)
    # sums over the steps, which stay tiles until the end
    b_dD = tl.zeros([BLOCK_D, AHEAD], tl.float32)
    b_dbias = tl.zeros([BLOCK_D, STEPS], tl.float32)
    b_doutput_offset = tl.zeros([BLOCK_D, AHEAD], tl.float32)

    # tiles of the first pass over a chunk
    o_a = tl.arange(0, AHEAD)
    p_u = tile_pointers(u_ptr, i_b, i_d, o_d, stride_u_batch, stride_u_dim, stride_u_time, AHEAD)
    p_delta = tile_pointers(delta_ptr, i_b, i_d, o_d, stride_delta_batch, stride_delta_dim, stride_delta_time, AHEAD)
    if z_ptr is not None:
        p_z = tile_pointers(z_ptr, i_b, i_d, o_d, stride_z_batch, stride_z_dim, stride_z_time, AHEAD)
    if dout_ptr is not None:
        p_dout = tile_pointers(dout_ptr, i_b, i_d, o_d, stride_dout_batch, stride_dout_dim, stride_dout_time, AHEAD)
    if dz_ptr is not None:
        p_dz = tile_pointers(dz_ptr, i_b, i_d, o_d, stride_dz_batch, stride_dz_dim, stride_dz_time, AHEAD)
    # and of the second
    o_t = tl.arange(0, STEPS)
    if du_ptr is not None:
        p_du = tile_pointers(du_ptr, i_b, i_d, o_d, stride_du_batch, stride_du_dim, stride_du_time, STEPS)
    if ddelta_ptr is not None:
        p_ddelta = tile_pointers(
            ddelta_ptr, i_b, i_d, o_d, stride_ddelta_batch, stride_ddelta_dim, stride_ddelta_time, STEPS
        )
    # [BLOCK_N]
    o_B = (i_b * groups + i_group) * seqlen * DSTATE + o_n
    o_dB = i_block.to(tl.int64) * batch * groups * seqlen * DSTATE + o_B
    # room for the states of a chunk and a_{t+1} G_{t+1} of the step t + 1 worked on last, then for delta, g, the slope
    # of delta and u
    STATE: tl.constexpr = BLOCK_D * BLOCK_N
    KEPT: tl.constexpr = 4 * BLOCK_D
    p_states = scratch_ptr + tl.program_id(0).to(tl.int64) * ((CHUNK // STEPS + 1) * STATE + CHUNK * KEPT)
    p_kept = p_states + (CHUNK // STEPS + 1) * STATE + tl.arange(0, BLOCK_D)[:, None]
    p_note = p_kept + o_a[None, :] * KEPT
    p_kept += o_t[None, :] * KEPT
    p_states += tl.arange(0, BLOCK_D)[None, :] * BLOCK_N + o_n[:, None]
    p_carry = p_states + CHUNK // STEPS * STATE

    n_chunks = (stop - start + CHUNK - 1) // CHUNK
    for i in range(n_chunks):
        chunk_start = start + (n_chunks - 1 - i) * CHUNK
        chunk_stop = tl.minimum(chunk_start + CHUNK, stop)
        if chunk_start == begin:
            b_h = load_parameter(initial_state_ptr, i_row * stride_initial_state + i_d * DSTATE, o_nd, m_nd)
        else:
            chunk = first_chunk + (chunk_start - begin) // CHUNK - 1
            b_h = tl.load(chunk_states_ptr + (chunk * dim + i_d) * DSTATE + o_nd, mask=m_nd, other=0.0)
        b_state_offset = load_parameter(state_offset_ptr, i_row * stride_state_offset + i_d * DSTATE, o_nd, m_nd)
        if dstate_offset_ptr is not None:
            p_dstate_offset = dstate_offset_ptr + (i_segment * dim + i_d) * DSTATE + o_nd
            b_dstate_offset = tl.load(p_dstate_offset, mask=m_nd & states_if(i > 0, o_n, DSTATE)[:, None], other=0.0)
        for t in range(chunk_start, chunk_stop, AHEAD):
            m_dt = m_d[:, None] & (t + o_a < stop)[None, :]
            # [BLOCK_D, AHEAD]
            b_u = load_tile(p_u, t, stride_u_time, m_dt)
            b_delta, b_slope = load_delta(p_delta, t, stride_delta_time, m_dt, b_bias, DELTA_SOFTPLUS)
            if dout_ptr is None:
                b_g = tl.zeros([BLOCK_D, AHEAD], tl.float32)
            else:
                b_g = load_tile(p_dout, t, stride_dout_time, m_dt)
            if z_ptr is not None:
                b_z = load_tile(p_z, t, stride_z_time, m_dt)
                b_sigmoid = sigmoid(b_z)
                b_gate_slope = b_g * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
                b_g *= b_z * b_sigmoid
            tl.store(p_note + (t - chunk_start) * KEPT, b_delta)
            tl.store(p_note + (t - chunk_start) * KEPT + BLOCK_D, b_g)
            tl.store(p_note + (t - chunk_start) * KEPT + 2 * BLOCK_D, b_slope)
            tl.store(p_note + (t - chunk_start) * KEPT + 3 * BLOCK_D, b_u)
            b_delta, b_delta_u = computed(b_delta, b_delta * b_u)
            delta = steps_of(b_delta, BLOCK_D, AHEAD)
            delta_u = steps_of(b_delta_u, BLOCK_D, AHEAD)
            g = steps_of(b_g, BLOCK_D, AHEAD)
            y = ()
            for k in tl.static_range(AHEAD):
                if STATES and k % STEPS == 0:
                    tl.store(p_states + ((t - chunk_start) // STEPS + k // STEPS) * STATE, b_h)
                m_B = states_if(t + k < stop, o_n, DSTATE)
                b_C = tl.load(C_ptr + o_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
                if dstate_offset_ptr is not None:
                    b_dstate_offset += g[k][None, :] * b_C[:, None]
                if STATES:
                    b_B = tl.load(B_ptr + o_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
                    b_h = tl.exp2(delta[k][None, :] * b_A) * b_h + delta_u[k][None, :] * b_B[:, None]
                    if state_offset_ptr is None:
                        b_read = b_h
                    else:
                        b_read = b_h + b_state_offset
                    if dC_ptr is not None:
                        b_dC = tl.sum(b_read * g[k][None, :], axis=1)
                        tl.store(dC_ptr + o_dB + (tl.cast(t, tl.int64) + k) * DSTATE, b_dC, mask=m_B)
                    if dz_ptr is not None:
                        y = y + (tl.sum(b_read * b_C[:, None], axis=0),)
            if dz_ptr is not None:
                b_y = tile_of(y, BLOCK_D, AHEAD) + b_D[:, None] * b_u + b_output_offset[:, None]
                store_tile(p_dz, t, stride_dz_time, b_gate_slope * b_y, m_dt)
            b_dD += b_g * b_u
            b_doutput_offset += b_g
        if dstate_offset_ptr is not None:
            tl.store(p_dstate_offset, b_dstate_offset, mask=m_nd)

        if ADJOINTS:
            tl.debug_barrier()
            if i == 0:
                b_carry = load_parameter(adjoint_ptr, (i_segment * dim + i_d) * DSTATE, o_nd, m_nd)
            else:
                b_carry = tl.load(p_carry)
            if dA_ptr is not None:
                p_dA = dA_ptr + (i_segment * dim + i_d) * DSTATE + o_nd
                b_dA = tl.load(p_dA, mask=m_nd & states_if(i > 0, o_n, DSTATE)[:, None], other=0.0)
            n_tiles = (chunk_stop - chunk_start + STEPS - 1) // STEPS
            for j in range(n_tiles):
                i_tile = n_tiles - 1 - j
                t = chunk_start + i_tile * STEPS
                m_dt = m_d[:, None] & (t + o_t < stop)[None, :]
                # [BLOCK_D, STEPS]
                b_delta = tl.load(p_kept + i_tile * STEPS * KEPT)
                b_g = tl.load(p_kept + i_tile * STEPS * KEPT + BLOCK_D)
                b_slope = tl.load(p_kept + i_tile * STEPS * KEPT + 2 * BLOCK_D)
                b_u = tl.load(p_kept + i_tile * STEPS * KEPT + 3 * BLOCK_D)
                delta = steps_of(b_delta, BLOCK_D, STEPS)
                delta_u = steps_of(b_delta * b_u, BLOCK_D, STEPS)
                g = steps_of(b_g, BLOCK_D, STEPS)
                # STEPS states and the one before them, each [BLOCK_N, BLOCK_D]
                if STATES:
                    b_h = tl.load(p_states + i_tile * STATE)
                    h = (b_h,)
                    for k in tl.static_range(STEPS - 1):
                        m_B = states_if(t + k < stop, o_n, DSTATE)
                        b_B = tl.load(B_ptr + o_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
                        b_h = tl.exp2(delta[k][None, :] * b_A) * b_h + delta_u[k][None, :] * b_B[:, None]
                        h = h + (b_h,)
                decayed = ()
                input = ()
                for k in tl.static_range(STEPS - 1, -1, -1):
                    m_B = states_if(t + k < stop, o_n, DSTATE)
                    b_C = tl.load(C_ptr + o_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
                    b_G = g[k][None, :] * b_C[:, None] + b_carry
                    b_carry = tl.exp2(delta[k][None, :] * b_A) * b_G
                    if dB_ptr is not None:
                        b_dB = tl.sum(b_G * delta_u[k][None, :], axis=1)
                        tl.store(dB_ptr + o_dB + (tl.cast(t, tl.int64) + k) * DSTATE, b_dB, mask=m_B)
                    if (du_ptr is not None) or (ddelta_ptr is not None) or (ddelta_bias_ptr is not None):
                        b_B = tl.load(B_ptr + o_B + (tl.cast(t, tl.int64) + k) * DSTATE, mask=m_B, other=0.0)
                        input = (tl.sum(b_G * b_B[:, None], axis=0),) + input
                    if (dA_ptr is not None) or (ddelta_ptr is not None) or (ddelta_bias_ptr is not None):
                        b_q = b_carry * h[k]
                        if dA_ptr is not None:
                            b_dA += delta[k][None, :] * b_q
                        if (ddelta_ptr is not None) or (ddelta_bias_ptr is not None):
                            decayed = (tl.sum(b_q * b_A, axis=0),) + decayed

                # [BLOCK_D, STEPS]
                if (du_ptr is not None) or (ddelta_ptr is not None) or (ddelta_bias_ptr is not None):
                    b_input = tile_of(input, BLOCK_D, STEPS)
                if du_ptr is not None:
                    store_tile(p_du, t, stride_du_time, b_delta * b_input + b_D[:, None] * b_g, m_dt)
                if (ddelta_ptr is not None) or (ddelta_bias_ptr is not None):
                    b_ddelta = (b_u * b_input + tile_of(decayed, BLOCK_D, STEPS) * LN2) * b_slope
                    b_dbias += tl.where(m_dt, b_ddelta, 0.0)
                if ddelta_ptr is not None:
                    store_tile(p_ddelta, t, stride_ddelta_time, b_ddelta, m_dt)
            if dA_ptr is not None:
                tl.store(p_dA, b_dA, mask=m_nd)
            tl.store(p_carry, b_carry)
            if dinitial_state_ptr is not None:
                if chunk_start == begin:
                    tl.store(dinitial_state_ptr + (i_row * dim + i_d) * DSTATE + o_nd, b_carry, mask=m_nd)
            tl.debug_barrier()

    if dD_ptr is not None:
        tl.store(dD_ptr + i_segment * dim + i_d + o_d, tl.sum(b_dD, axis=1), mask=m_d)
    if ddelta_bias_ptr is not None:
        tl.store(ddelta_bias_ptr + i_segment * dim + i_d + o_d, tl.sum(b_dbias, axis=1), mask=m_d)
    if doutput_offset_ptr is not None:
        tl.store(doutput_offset_ptr + i_segment * dim + i_d + o_d, tl.sum(b_doutput_offset, axis=1), mask=m_d)

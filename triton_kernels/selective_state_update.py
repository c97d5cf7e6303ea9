"""One decoding step of the selective scan, with a state offset, shared or of each row's own adapter.

    h  <- exp(delta A) h + delta B x                delta = softplus(dt + dt_bias), or dt + dt_bias
    out = (C . (h + state_offset) + D x + output_offset) silu(z)

The offsets are read, never carried: the state handed on is h alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtune.triton_kernels.selective_scan_tiles import LOG2E, load_parameter, sigmoid, softplus

# of a warp
STATES = 512


@triton.jit
def selective_state_update_fwd_kernel(
    # pointers; those of optional tensors may be None
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, state_offset_ptr, output_offset_ptr,
    adapter_index_ptr, out_ptr,
    # sizes; a group of B and C serves group_dim channels
    dim, group_dim, n_adapters,
    # strides between the rows of a batch or the adapters, 0 where one offset serves all rows
    stride_state_offset, stride_output_offset,
    # meta
    DT_SOFTPLUS: tl.constexpr, DSTATE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    i_group = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_D
    # the first channel, and the others counted from it: small offsets take one pointer for a whole tile
    i_d = i_group * group_dim + first
    i_bd = i_b * dim + i_d
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d = first + o_d < group_dim
    m_n = o_n < DSTATE
    m_dn = m_d[:, None] & m_n[None, :]
    # [BLOCK_D, BLOCK_N]
    o_dn = o_d[:, None] * DSTATE + o_n[None, :]
    p_state = state_ptr + i_bd * DSTATE + o_dn

    # which offset this row reads, and where it has one
    i_o = i_b
    m_o = m_d
    if adapter_index_ptr is not None:
        i_o = tl.load(adapter_index_ptr + i_b).to(tl.int64)
        m_o = first + o_d < tl.where((i_o >= 0) & (i_o < n_adapters), group_dim, 0)

    # [BLOCK_D]
    b_x = tl.load(x_ptr + i_bd + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_delta = tl.load(dt_ptr + i_bd + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_delta += load_parameter(dt_bias_ptr, i_d, o_d, m_d)
    if DT_SOFTPLUS:
        b_delta, _ = softplus(b_delta)

    # [BLOCK_N]
    o_bn = (i_b * tl.num_programs(1) + i_group) * DSTATE + o_n
    b_B = tl.load(B_ptr + o_bn, mask=m_n, other=0.0).to(tl.float32)
    b_C = tl.load(C_ptr + o_bn, mask=m_n, other=0.0).to(tl.float32)

    # [BLOCK_D, BLOCK_N]
    b_A = tl.load(A_ptr + i_d * DSTATE + o_dn, mask=m_dn, other=0.0)
    b_h = tl.load(p_state, mask=m_dn, other=0.0)
    b_h = tl.exp2((b_delta * LOG2E)[:, None] * b_A) * b_h + (b_delta * b_x)[:, None] * b_B[None, :]
    tl.store(p_state, b_h, mask=m_dn)
    b_h += load_parameter(state_offset_ptr, i_o * stride_state_offset + i_d * DSTATE, o_dn, m_o[:, None] & m_n[None, :])

    # [BLOCK_D]
    b_y = tl.sum(b_h * b_C[None, :], axis=1) + load_parameter(D_ptr, i_d, o_d, m_d) * b_x
    b_y += load_parameter(output_offset_ptr, i_o * stride_output_offset + i_d, o_d, m_o)
    if z_ptr is not None:
        b_z = tl.load(z_ptr + i_bd + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y *= b_z * sigmoid(b_z)
    tl.store(out_ptr + i_bd + o_d, b_y.to(out_ptr.dtype.element_ty), mask=m_d)


def selective_state_update_fwd(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    adapter_index: Tensor | None,
    out: Tensor,
) -> None:
    """Advance `state` by one token in place and write its output.

    Args:
        state: (batch, dim, dstate), float32, contiguous. Overwritten.
        x, dt, z, out: (batch, dim), one dtype, contiguous.
        A: (dim, dstate), float32, contiguous.
        B, C: (batch, dstate) or (batch, groups, dstate), dtype of x, contiguous.
        D, dt_bias: (dim,), float32.
        state_offset: (dim, dstate) shared, (batch, dim, dstate), or with `adapter_index` (n_adapters, dim, dstate);
            float32, with contiguous matrices.
        output_offset: (dim,) shared, (batch, dim), or with `adapter_index` (n_adapters, dim); float32, contiguous.
        adapter_index: (batch,), int32 or int64, contiguous: the adapter whose offsets each row reads. One that does
            not exist, as -1, stands for no offset.
    """
    batch, dim, dstate = state.shape
    groups = B.shape[1] if B.dim() == 3 else 1
    group_dim = dim // groups
    block_n = triton.next_power_of_2(dstate)
    # 16 states to a thread: with fewer, what there is of a channel alone costs more than its states
    block_d = min(max(STATES // block_n, 1), 32, triton.next_power_of_2(group_dim))
    grid = (triton.cdiv(group_dim, block_d), groups, batch)
    stacked = state_offset if output_offset is None else output_offset
    with torch.cuda.device_of(state):
        selective_state_update_fwd_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, state_offset, output_offset, adapter_index, out,
            dim, group_dim, 0 if adapter_index is None else stacked.shape[0],
            0 if state_offset is None or state_offset.dim() == 2 else state_offset.stride(0),
            0 if output_offset is None or output_offset.dim() == 1 else output_offset.stride(0),
            DT_SOFTPLUS=dt_softplus, DSTATE=dstate, BLOCK_D=block_d, BLOCK_N=block_n,
            num_warps=max(block_n // STATES, 1), enable_fp_fusion=True,
        )  # fmt: skip

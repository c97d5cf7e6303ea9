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


@triton.jit
def selective_state_update_fwd_kernel(
    # pointers; those of optional tensors may be None
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, state_offset_ptr, output_offset_ptr,
    adapter_index_ptr, out_ptr,
    # sizes; a group of B and C serves group_size channels
    dim, dstate, group_size, n_adapters,
    # strides between the rows of a batch or the adapters, 0 where one offset serves all rows
    stride_state_offset, stride_output_offset,
    # meta
    DT_SOFTPLUS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_d = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d = o_d < dim
    m_n = o_n < dstate
    m_dn = m_d[:, None] & m_n[None, :]
    # [BLOCK_D], [BLOCK_D, BLOCK_N]
    o_bd = i_b * dim + o_d
    o_dn = o_d[:, None] * dstate + o_n[None, :]
    p_state = state_ptr + i_b * dim * dstate + o_dn

    # which offset this row reads, and where it has one
    i_o = i_b
    m_o = m_d
    if adapter_index_ptr is not None:
        i_o = tl.load(adapter_index_ptr + i_b).to(tl.int64)
        m_o = o_d < tl.where((i_o >= 0) & (i_o < n_adapters), dim, 0)

    # [BLOCK_D]
    b_x = tl.load(x_ptr + o_bd, mask=m_d, other=0.0).to(tl.float32)
    b_delta = tl.load(dt_ptr + o_bd, mask=m_d, other=0.0).to(tl.float32)
    if dt_bias_ptr is not None:
        b_delta += tl.load(dt_bias_ptr + o_d, mask=m_d, other=0.0)
    if DT_SOFTPLUS:
        # log1p(e) = log(1 + e) e / ((1 + e) - 1) keeps its accuracy where 1 + e rounds; linear above 20
        b_e = tl.exp(tl.minimum(b_delta, 20.0))
        b_w = 1.0 + b_e
        b_log1p = tl.where(b_w == 1.0, b_e, tl.log(b_w) * (b_e / tl.where(b_w == 1.0, 1.0, b_w - 1.0)))
        b_delta = tl.where(b_delta > 20.0, b_delta, b_log1p)

    # [BLOCK_D or 1, BLOCK_N]
    if GROUPED:
        o_bn = (i_b * (dim // group_size) + o_d // group_size)[:, None] * dstate + o_n[None, :]
        m_bn = m_dn
    else:
        o_bn = i_b * dstate + o_n[None, :]
        m_bn = m_n[None, :]
    b_B = tl.load(B_ptr + o_bn, mask=m_bn, other=0.0).to(tl.float32)
    b_C = tl.load(C_ptr + o_bn, mask=m_bn, other=0.0).to(tl.float32)

    # [BLOCK_D, BLOCK_N]
    b_A = tl.load(A_ptr + o_dn, mask=m_dn, other=0.0)
    b_h = tl.load(p_state, mask=m_dn, other=0.0)
    b_h = tl.exp(b_delta[:, None] * b_A) * b_h + (b_delta * b_x)[:, None] * b_B
    tl.store(p_state, b_h, mask=m_dn)
    if state_offset_ptr is not None:
        b_h += tl.load(state_offset_ptr + i_o * stride_state_offset + o_dn, mask=m_o[:, None] & m_n[None, :], other=0.0)

    # [BLOCK_D]
    b_y = tl.sum(b_h * b_C, axis=1)
    if D_ptr is not None:
        b_y += tl.load(D_ptr + o_d, mask=m_d, other=0.0) * b_x
    if output_offset_ptr is not None:
        b_y += tl.load(output_offset_ptr + i_o * stride_output_offset + o_d, mask=m_o, other=0.0)
    if z_ptr is not None:
        b_z = tl.load(z_ptr + o_bd, mask=m_d, other=0.0).to(tl.float32)
        b_y *= b_z / (1.0 + tl.exp(-b_z))
    tl.store(out_ptr + o_bd, b_y.to(out_ptr.dtype.element_ty), mask=m_d)


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
    block_n = triton.next_power_of_2(dstate)
    # 512 states to a program, 4 to a thread: small, so that one sequence already fills a GPU
    block_d = min(max(512 // block_n, 1), triton.next_power_of_2(dim))
    grid = (triton.cdiv(dim, block_d), batch)
    group_size = dim // (B.shape[1] if B.dim() == 3 else 1)
    stacked = state_offset if output_offset is None else output_offset
    with torch.cuda.device_of(state):
        selective_state_update_fwd_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, state_offset, output_offset, adapter_index, out,
            dim, dstate, group_size, 0 if adapter_index is None else stacked.shape[0],
            0 if state_offset is None or state_offset.dim() == 2 else state_offset.stride(0),
            0 if output_offset is None or output_offset.dim() == 1 else output_offset.stride(0),
            DT_SOFTPLUS=dt_softplus, GROUPED=group_size < dim, BLOCK_D=block_d, BLOCK_N=block_n,
            num_warps=4,
        )  # fmt: skip

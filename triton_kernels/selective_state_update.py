"""One decoding step of the selective scan, with a state offset.

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
    out_ptr,
    # sizes
    dim, dstate,
    # strides between the rows of a batch, 0 where one offset serves them all
    stride_state_offset_batch, stride_output_offset_batch,
    # meta
    DT_SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
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

    # [BLOCK_N]
    b_B = tl.load(B_ptr + i_b * dstate + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_C = tl.load(C_ptr + i_b * dstate + o_n, mask=m_n, other=0.0).to(tl.float32)

    # [BLOCK_D, BLOCK_N]
    b_A = tl.load(A_ptr + o_dn, mask=m_dn, other=0.0)
    b_h = tl.load(p_state, mask=m_dn, other=0.0)
    b_h = tl.exp(b_delta[:, None] * b_A) * b_h + (b_delta * b_x)[:, None] * b_B[None, :]
    tl.store(p_state, b_h, mask=m_dn)
    if state_offset_ptr is not None:
        b_h += tl.load(state_offset_ptr + i_b * stride_state_offset_batch + o_dn, mask=m_dn, other=0.0)

    # [BLOCK_D]
    b_y = tl.sum(b_h * b_C[None, :], axis=1)
    if D_ptr is not None:
        b_y += tl.load(D_ptr + o_d, mask=m_d, other=0.0) * b_x
    if output_offset_ptr is not None:
        b_y += tl.load(output_offset_ptr + i_b * stride_output_offset_batch + o_d, mask=m_d, other=0.0)
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
    out: Tensor,
) -> None:
    """Advance `state` by one token in place and write its output.

    Args:
        state: (batch, dim, dstate), float32, contiguous. Overwritten.
        x, dt, z, out: (batch, dim), one dtype, contiguous.
        A: (dim, dstate), float32, contiguous.
        B, C: (batch, dstate), dtype of x, contiguous.
        D, dt_bias: (dim,), float32.
        state_offset: (dim, dstate) shared or (batch, dim, dstate), float32, contiguous.
        output_offset: (dim,) shared or (batch, dim), float32, contiguous.
    """
    batch, dim, dstate = state.shape
    block_n = triton.next_power_of_2(dstate)
    # 512 states to a program, 4 to a thread: small, so that one sequence already fills a GPU
    block_d = min(max(512 // block_n, 1), triton.next_power_of_2(dim))
    grid = (triton.cdiv(dim, block_d), batch)
    with torch.cuda.device_of(state):
        selective_state_update_fwd_kernel[grid](
            state, x, dt, A, B, C, D, z, dt_bias, state_offset, output_offset, out,
            dim, dstate,
            0 if state_offset is None or state_offset.dim() == 2 else dim * dstate,
            0 if output_offset is None or output_offset.dim() == 1 else dim,
            DT_SOFTPLUS=dt_softplus, BLOCK_D=block_d, BLOCK_N=block_n,
            num_warps=4,
        )  # fmt: skip

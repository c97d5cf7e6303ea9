"""One decoding step of the causal convolution.

out = bias + sum_k weight_k steps_k            steps = conv_state, x          [then silu]
conv_state <- the last width - 1 of steps
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def causal_conv1d_update_fwd_kernel(
    # pointers; that of the bias may be None
    x_ptr, conv_state_ptr, weight_ptr, bias_ptr, out_ptr,
    # sizes
    dim,
    # strides in elements
    stride_x_batch, stride_x_dim, stride_state_batch, stride_state_dim, stride_state_time,
    stride_weight_dim, stride_weight_width, stride_bias, stride_out_batch, stride_out_dim,
    # meta
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < dim
    p_state = conv_state_ptr + i_b * stride_state_batch + o_d * stride_state_dim
    # every step is read before one is written
    b_steps = ()
    for k in tl.static_range(WIDTH - 1):
        b_steps += (tl.load(p_state + k * stride_state_time, mask=m_d, other=0.0).to(tl.float32),)
    b_x = tl.load(x_ptr + i_b * stride_x_batch + o_d * stride_x_dim, mask=m_d, other=0.0)
    b_steps += (b_x.to(tl.float32),)

    b_y = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_d * stride_bias, mask=m_d, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        p_weight = weight_ptr + o_d * stride_weight_dim + k * stride_weight_width
        b_y += tl.load(p_weight, mask=m_d, other=0.0).to(tl.float32) * b_steps[k]
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    tl.store(out_ptr + i_b * stride_out_batch + o_d * stride_out_dim, b_y.to(out_ptr.dtype.element_ty), mask=m_d)
    for k in tl.static_range(WIDTH - 1):
        b_step = b_steps[k + 1].to(conv_state_ptr.dtype.element_ty)
        tl.store(p_state + k * stride_state_time, b_step, mask=m_d)


def causal_conv1d_update_fwd(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor
) -> None:
    """Convolve one more step and move `conv_state` on by one, in place.

    Args:
        x, out: (batch, dim), one dtype.
        conv_state: (batch, dim, width - 1). Overwritten.
        weight: (dim, width).
        bias: (dim,).
    """
    batch, dim = x.shape
    block_d = min(triton.next_power_of_2(dim), 256)
    with torch.cuda.device_of(x):
        causal_conv1d_update_fwd_kernel[(batch, triton.cdiv(dim, block_d))](
            x, conv_state, weight, bias, out, dim,
            *x.stride(), *conv_state.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *out.stride(),
            WIDTH=weight.shape[1], SILU=silu, BLOCK_D=block_d,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

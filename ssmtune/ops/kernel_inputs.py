"""What the kernels take: a dtype that sequences share, parameters in float32, and memory that is dense along an axis.

What fits is passed on as it is; everything else is copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ssmtune.ops.layout import contiguous, dense_axis


def sequence(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A tensor along seqlen in that dtype, dense along one of its last two axes; None for None."""
    return None if x is None else dense_axis(x if x.dtype == dtype else x.to(dtype))


def parameter(x: Tensor | None) -> Tensor | None:
    """A tensor without seqlen, contiguous in float32; None for None."""
    return contiguous(x, torch.float32)


def scan_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The inputs of the scan."""
    return (
        dense_axis(u),
        sequence(delta, u.dtype),
        parameter(A),
        sequence(B, u.dtype),
        sequence(C, u.dtype),
        parameter(D),
        sequence(z, u.dtype),
        *(parameter(tensor) for tensor in (delta_bias, initial_state, state_offset, output_offset)),
    )


def dense_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A (batch, seqlen, heads, size) tensor in that dtype, dense along its last two axes as projections give them."""
    x = x if x.dtype == dtype else x.to(dtype)
    dense = (x.shape[3] == 1 or x.stride(3) == 1) and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if dense else x.contiguous()


def ssd_inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The inputs of Mamba-2's scan; steps are few, and in float32 as parameters are."""
    B, C = (dense_heads(tensor, x.dtype) for tensor in (B, C))
    return dense_heads(x, x.dtype), parameter(dt), parameter(A), B, C, *(parameter(tensor) for tensor in others)


def conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The inputs of the convolution."""
    return dense_axis(x), parameter(weight), parameter(bias), parameter(initial_states), cu_seqlens


def update_in_float32(
    update: Callable[..., Tensor], x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """Call an update of the convolution state that takes no float64 with float32 in its place."""
    weight, bias, state = (
        tensor.float() if tensor is not None and tensor.dtype == torch.float64 else tensor
        for tensor in (weight, bias, conv_state)
    )
    out = update(x, state, weight, bias, silu)
    if state is not conv_state:
        conv_state.copy_(state)
    return out

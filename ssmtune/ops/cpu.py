"""Calls into the compiled CPU kernels, `torch.ops.ssmtune_native`.

The kernels write into tensors their caller allocated, and skip each result that is None. They take (batch, dim, seqlen)
tensors that are dense along dim or seqlen, and everything else contiguous in float32.
"""

import torch
from torch import Tensor

from ssmtune.ops.layout import contiguous, dense_axis

CHUNK_SIZE = 64
CHANNEL_BLOCK = 16


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the state between chunks for the backward scan."""
    # n steps have (n - 1) // CHUNK_SIZE states between chunks, and several sequences together at most this many
    n_chunks = (seqlen - (1 if n_sequences is None else n_sequences)) // CHUNK_SIZE
    # the channels of each group begin with a block of their own
    padded = (dim // groups + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK
    return batch, n_chunks, groups * padded, dstate


def selective_scan_forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan."""
    torch.ops.ssmtune_native.selective_scan_fwd(
        *_scan_inputs(*inputs), cu_seqlens, delta_softplus, out, last_state, chunk_states
    )


def selective_scan_backward(
    dout: Tensor | None,
    dlast_state: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the scan backward."""
    torch.ops.ssmtune_native.selective_scan_bwd(
        _sequence(dout, inputs[0].dtype),
        _parameter(dlast_state),
        *_scan_inputs(*inputs),
        cu_seqlens,
        chunk_states,
        delta_softplus,
        *gradients,
    )


def selective_state_update(*args) -> Tensor:
    """Advance the state by one step."""
    return torch.ops.ssmtune_native.selective_state_update(*args)


def causal_conv1d_forward(
    inputs: tuple[Tensor | None, ...], silu: bool, out: Tensor, final_states: Tensor | None
) -> None:
    """Run the convolution."""
    torch.ops.ssmtune_native.causal_conv1d_fwd(*_conv_inputs(*inputs), silu, out, final_states)


def causal_conv1d_backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    silu: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the convolution backward."""
    x = inputs[0]
    torch.ops.ssmtune_native.causal_conv1d_bwd(
        torch.zeros_like(x) if dout is None else _sequence(dout, x.dtype),
        _sequence(dfinal_states, x.dtype),
        *_conv_inputs(*inputs),
        silu,
        *gradients,
    )


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Advance the state of the convolution by one step."""
    weight, bias, state = (
        tensor.float() if tensor is not None and tensor.dtype == torch.float64 else tensor
        for tensor in (weight, bias, conv_state)
    )
    out = torch.ops.ssmtune_native.causal_conv1d_update(x, state, weight, bias, silu)
    if state is not conv_state:
        conv_state.copy_(state)
    return out


def _sequence(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else dense_axis(x if x.dtype == dtype else x.to(dtype))


def _parameter(x: Tensor | None) -> Tensor | None:
    return contiguous(x, torch.float32)


def _scan_inputs(
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
    return (
        dense_axis(u),
        _sequence(delta, u.dtype),
        _parameter(A),
        _sequence(B, u.dtype),
        _sequence(C, u.dtype),
        _parameter(D),
        _sequence(z, u.dtype),
        *(_parameter(tensor) for tensor in (delta_bias, initial_state, state_offset, output_offset)),
    )


def _conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, ...]:
    return dense_axis(x), _parameter(weight), _parameter(bias), _parameter(initial_states), cu_seqlens

"""Calls into the compiled CPU kernels, `torch.ops.ssmtune_native`.

The kernels write into tensors their caller allocated, and skip each result that is None. They take (batch, dim, seqlen)
tensors that are dense along dim or seqlen, and everything else contiguous in float32.
"""

import torch
from torch import Tensor

from ssmtune.ops.layout import contiguous, dense_axis
from ssmtune.ops.reference import ALONG_STEPS, has_rows, split_sequences

CHUNK_SIZE = 64
CHANNEL_BLOCK = 16


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps one state per chunk for the backward scan."""
    n_chunks = (seqlen + CHUNK_SIZE - 1) // CHUNK_SIZE
    if n_sequences is not None:
        # each sequence has chunks of its own, and at most one more than fit into it
        n_chunks = seqlen // CHUNK_SIZE + n_sequences
    padded_dim = (dim + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK
    return batch, n_chunks, padded_dim, dstate


def selective_scan_forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan."""
    if cu_seqlens is not None:
        if chunk_states is not None:
            chunk_states.zero_()
        for i, (start, stop, chunks, sequence) in enumerate(_sequences(inputs, cu_seqlens)):
            kept = None if chunk_states is None else chunk_states[:, chunks]
            selective_scan_forward(sequence, None, delta_softplus, out[:, :, start:stop], last_state[i : i + 1], kept)
        return
    torch.ops.ssmtune_native.selective_scan_fwd(*_scan_inputs(*inputs), delta_softplus, out, last_state, chunk_states)


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
    if cu_seqlens is not None:
        for i, (start, stop, chunks, sequence) in enumerate(_sequences(inputs, cu_seqlens)):
            own = []
            for name, tensor, gradient in zip(_NAMES, inputs, gradients, strict=True):
                if gradient is None:
                    own.append(None)
                elif name in ALONG_STEPS:
                    own.append(gradient[..., start:stop])
                elif has_rows(name, tensor):
                    own.append(gradient[i : i + 1])
                else:
                    own.append(gradient if i == 0 else torch.empty_like(gradient))
            selective_scan_backward(
                None if dout is None else dout[:, :, start:stop],
                None if dlast_state is None else dlast_state[i : i + 1],
                sequence,
                None,
                chunk_states[:, chunks],
                delta_softplus,
                own,
            )
            for name, tensor, gradient, piece in zip(_NAMES, inputs, gradients, own, strict=True):
                if i > 0 and gradient is not None and name not in ALONG_STEPS and not has_rows(name, tensor):
                    gradient += piece
        return
    torch.ops.ssmtune_native.selective_scan_bwd(
        _sequence(dout, inputs[0].dtype),
        _parameter(dlast_state),
        *_scan_inputs(*inputs),
        chunk_states,
        delta_softplus,
        *gradients,
    )


_NAMES = (
    *("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    *("initial_state", "state_offset", "output_offset"),
)


def _sequences(inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor):
    bounds = cu_seqlens.tolist()
    sequences = split_sequences(cu_seqlens, dict(zip(_NAMES, inputs, strict=True)))
    for i, sequence in enumerate(sequences):
        first = bounds[i] // CHUNK_SIZE + i
        n_chunks = (bounds[i + 1] - bounds[i] + CHUNK_SIZE - 1) // CHUNK_SIZE
        yield bounds[i], bounds[i + 1], slice(first, first + n_chunks), tuple(sequence.values())


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


def causal_conv1d_update(*args) -> Tensor:
    """Advance the state of the convolution by one step."""
    return torch.ops.ssmtune_native.causal_conv1d_update(*args)


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

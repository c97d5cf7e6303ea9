"""The reference operators as a backend: results go into tensors the caller allocated, and None is skipped."""

from collections.abc import Sequence

from torch import Tensor

from ssmtune.ops import reference, reference_backward


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of an empty buffer: the reference keeps nothing between its forward and its backward pass."""
    return (0,)


def selective_scan_forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan."""
    *operands, initial_state, state_offset, output_offset = inputs
    results = reference.selective_scan_reference(
        *operands,
        delta_softplus,
        initial_state=initial_state,
        state_offset=state_offset,
        output_offset=output_offset,
        cu_seqlens=cu_seqlens,
    )
    _write(results, (out, last_state))


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
    results = reference_backward.selective_scan_reference_backward(
        dout, dlast_state, *inputs, delta_softplus, cu_seqlens
    )
    _write(results, gradients)


def selective_state_update(
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
) -> Tensor:
    """Advance the state by one step."""
    return reference.selective_state_update_reference(
        *(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus),
        state_offset=state_offset,
        output_offset=output_offset,
        adapter_index=adapter_index,
    )


def causal_conv1d_forward(
    inputs: tuple[Tensor | None, ...], silu: bool, out: Tensor, final_states: Tensor | None
) -> None:
    """Run the convolution."""
    x, weight, bias, initial_states, cu_seqlens = inputs
    results = reference.causal_conv1d_reference(
        *(x, weight, bias),
        initial_states=initial_states,
        activation="silu" if silu else None,
        cu_seqlens=cu_seqlens,
    )
    _write(results, (out, final_states))


def causal_conv1d_backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    silu: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the convolution backward."""
    _write(reference_backward.causal_conv1d_reference_backward(dout, dfinal_states, *inputs, silu), gradients)


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Advance the state of the convolution by one step."""
    return reference.causal_conv1d_update_reference(x, conv_state, weight, bias, activation="silu" if silu else None)


def _write(results: Sequence[Tensor | None], targets: Sequence[Tensor | None]) -> None:
    for result, target in zip(results, targets, strict=True):
        if target is not None:
            target.copy_(result)

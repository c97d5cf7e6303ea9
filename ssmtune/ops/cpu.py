"""Calls into the compiled CPU kernels, `torch.ops.ssmtune_native`.

The kernels write into tensors their caller allocated, and skip each result that is None. They take (batch, dim, seqlen)
tensors that are dense along dim or seqlen, and everything else contiguous in float32.
"""

import torch
from torch import Tensor

from ssmtune import native
from ssmtune.ops.kernel_inputs import conv_inputs, parameter, scan_inputs, sequence, update_in_float32
from ssmtune.ops.packing import n_kept_states

CHUNK_SIZE = 32
CHANNEL_BLOCK = 16


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the state between chunks for the backward scan."""
    # the channels of each group begin with a block of their own
    padded = (dim // groups + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK * CHANNEL_BLOCK
    return batch, n_kept_states(seqlen, n_sequences, CHUNK_SIZE), groups * padded, dstate


def selective_scan_forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan."""
    native.operator("selective_scan_fwd")(
        *scan_inputs(*inputs), cu_seqlens, delta_softplus, out, last_state, chunk_states
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
    native.operator("selective_scan_bwd")(
        sequence(dout, inputs[0].dtype),
        parameter(dlast_state),
        *scan_inputs(*inputs),
        cu_seqlens,
        chunk_states,
        delta_softplus,
        *gradients,
    )


def selective_state_update(*args) -> Tensor:
    """Advance the state by one step."""
    return native.operator("selective_state_update")(*args)


def causal_conv1d_forward(
    inputs: tuple[Tensor | None, ...], silu: bool, out: Tensor, final_states: Tensor | None
) -> None:
    """Run the convolution."""
    native.operator("causal_conv1d_fwd")(*conv_inputs(*inputs), silu, out, final_states)


def causal_conv1d_backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    silu: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the convolution backward."""
    x = inputs[0]
    native.operator("causal_conv1d_bwd")(
        torch.zeros_like(x) if dout is None else sequence(dout, x.dtype),
        sequence(dfinal_states, x.dtype),
        *conv_inputs(*inputs),
        silu,
        *gradients,
    )


def causal_conv1d_update(*args) -> Tensor:
    """Advance the state of the convolution by one step."""
    return update_in_float32(native.operator("causal_conv1d_update"), *args)

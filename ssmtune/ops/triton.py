"""Calls into the Triton kernels: on a GPU, or in Triton's interpreter on the CPU.

The kernels are imported by the functions that launch them, for triton takes a second to load.
"""

import torch
from torch import Tensor

from ssmtune.ops.kernel_inputs import conv_inputs, parameter, scan_inputs, sequence, update_in_float32
from ssmtune.ops.packing import n_kept_states, sequence_bounds

WIDEST_FILTER = 8


def why_not_conv(width: int) -> str | None:
    """Give None when the kernels take filters of this width, or the reason they do not: each step is unrolled."""
    return None if width <= WIDEST_FILTER else f"the Triton kernels take widths up to {WIDEST_FILTER}, got {width}"


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the state between chunks for the backward scan."""
    from ssmtune.triton_kernels.selective_scan import CHUNK_SIZE

    return batch, n_kept_states(seqlen, n_sequences, CHUNK_SIZE), dim, dstate


def selective_scan_forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan."""
    from ssmtune.triton_kernels.selective_scan import selective_scan_fwd

    cu_seqlens = _cu_seqlens("selective_scan", cu_seqlens, out)
    selective_scan_fwd(*scan_inputs(*inputs), cu_seqlens, delta_softplus, out, last_state, chunk_states)


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
    from ssmtune.triton_kernels.selective_scan import selective_scan_bwd

    tensors = scan_inputs(*inputs)
    u = tensors[0]
    gradients_in = sequence(dout, u.dtype), parameter(dlast_state)
    cu_seqlens = _cu_seqlens("selective_scan", cu_seqlens, u)
    selective_scan_bwd(*gradients_in, *tensors, cu_seqlens, chunk_states, delta_softplus, gradients)


def selective_state_update(*args) -> Tensor:
    """Advance the state by one step."""
    from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd

    x = args[1]
    out = x.new_empty(x.shape)
    selective_state_update_fwd(*args, out)
    return out


def causal_conv1d_forward(
    inputs: tuple[Tensor | None, ...], silu: bool, out: Tensor, final_states: Tensor | None
) -> None:
    """Run the convolution."""
    from ssmtune.triton_kernels.causal_conv1d import causal_conv1d_fwd

    *tensors, cu_seqlens = conv_inputs(*inputs)
    cu_seqlens = _cu_seqlens("causal_conv1d", cu_seqlens, tensors[0])
    causal_conv1d_fwd(*tensors, cu_seqlens, silu, out, final_states)


def causal_conv1d_backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    silu: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the convolution backward."""
    from ssmtune.triton_kernels.causal_conv1d import causal_conv1d_bwd

    *tensors, cu_seqlens = conv_inputs(*inputs)
    x = tensors[0]
    dout = torch.zeros_like(x) if dout is None else sequence(dout, x.dtype)
    cu_seqlens = _cu_seqlens("causal_conv1d", cu_seqlens, x)
    causal_conv1d_bwd(dout, parameter(dfinal_states), *tensors, cu_seqlens, silu, *gradients)


def causal_conv1d_update(*args) -> Tensor:
    """Advance the state of the convolution by one step."""
    return update_in_float32(_causal_conv1d_update, *args)


def _causal_conv1d_update(x: Tensor, *args) -> Tensor:
    from ssmtune.triton_kernels.causal_conv1d_update import causal_conv1d_update_fwd

    out = x.new_empty(x.shape)
    causal_conv1d_update_fwd(x, *args, out)
    return out


def _cu_seqlens(op: str, cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """Make cu_seqlens contiguous; checks its values where that does not wait for a GPU."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        sequence_bounds(op, cu_seqlens, x.shape[2])
    return cu_seqlens.contiguous()

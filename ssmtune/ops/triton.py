"""Calls into the Triton kernels: on a GPU, or in Triton's interpreter on the CPU.

The kernels are imported by the functions that launch them, for triton takes a second to load.
"""

import torch
from torch import Tensor

from ssmtune.ops.kernel_inputs import conv_inputs, parameter, sequence, update_in_float32
from ssmtune.ops.packing import sequence_bounds


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

"""The convolution on a GPU by the package causal_conv1d (https://github.com/Dao-AILab/causal-conv1d).

The backend cuda convolves with it where it is installed and takes the call, and with the kernels of ssmtune elsewhere.
It brings its own autograd, so its calls of a sequence stand beside the operators of PyTorch and not below them.
"""

import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ssmtune.ops.layout import is_channels_last
from ssmtune.ops.packing import sequence_bounds

_NOT_THERE = "the package causal_conv1d is not installed"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# torch.compile cannot trace the import system
@torch.compiler.assume_constant_result
def is_there() -> bool:
    """Say whether the package is installed."""
    return "causal_conv1d" in sys.modules or _is_found()


@cache
def _is_found() -> bool:
    return find_spec("causal_conv1d") is not None


def why_not(
    x: Tensor,
    weight: Tensor,
    initial_states: Tensor | None,
    return_final_states: bool,
    cu_seqlens: Tensor | None,
) -> str | None:
    """Give None when the package takes this call of causal_conv1d, or the reason it does not."""
    if not is_there():
        return _NOT_THERE
    _, dim, seqlen = x.shape
    has_states = initial_states is not None or return_final_states
    if cu_seqlens is not None and has_states:
        return "the package causal_conv1d takes and returns no states of packed sequences"
    context = weight.shape[1] - 1
    if return_final_states and seqlen < context:
        return f"the package causal_conv1d returns states of sequences of {context} steps or more, got {seqlen}"
    if is_channels_last(x):
        if any(size % 8 for size in (dim, x.stride(0), x.stride(2))):
            return f"the package causal_conv1d takes channels-last memory in multiples of 8 channels, got {dim}"
    elif has_states or cu_seqlens is not None:
        return "the package causal_conv1d takes states and packed sequences in channels-last memory only"
    return _why_not_weight(weight)


def why_not_update(x: Tensor, conv_state: Tensor, weight: Tensor) -> str | None:
    """Give None when the package takes this call of causal_conv1d_update, or the reason it does not."""
    if not is_there():
        return _NOT_THERE
    if conv_state.dtype != x.dtype:
        return f"the package causal_conv1d updates states in the dtype of x, {x.dtype}, got {conv_state.dtype}"
    return _why_not_weight(weight)


def _why_not_weight(weight: Tensor) -> str | None:
    width = weight.shape[1]
    if not 2 <= width <= 4:
        return f"the package causal_conv1d takes widths of 2 to 4, got {width}"
    if weight.dtype not in _DTYPES:
        return f"the package causal_conv1d takes weights in float32, bfloat16 and float16, got {weight.dtype}"
    return None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the convolution; differentiable."""
    from causal_conv1d import causal_conv1d_fn

    seq_idx = None
    if cu_seqlens is not None:
        bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.shape[2])
        indices = torch.arange(len(bounds) - 1, dtype=torch.int32, device=x.device)
        seq_idx = indices.repeat_interleave(cu_seqlens.diff(), output_size=x.shape[2])[None]
    if initial_states is not None:
        initial_states = initial_states.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return causal_conv1d_fn(
        x,
        weight,
        None if bias is None else bias.to(weight.dtype),
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=return_final_states,
        activation="silu" if silu else None,
    )


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Advance the state of the convolution by one step."""
    from causal_conv1d import causal_conv1d_update as update

    bias = None if bias is None else bias.to(weight.dtype)
    return update(x, conv_state, weight, bias, activation="silu" if silu else None)

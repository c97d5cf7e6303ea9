"""Reading a mixer's states from a transformers cache.

A cache holds, for each mixer, the last `conv_kernel_size` inputs of the convolution and the recurrent state. Its
updates copy into tensors that stay where they are, which suits CUDA graphs but not autograd: with gradients
on, what is read is a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def read_states(cache: Any, layer_idx: int, conv_kernel_size: int) -> tuple[Tensor | None, Tensor | None]:
    """Read where the previous call stopped.

    Args:
        cache: a transformers `Cache`, or None.
        layer_idx: the layer of the mixer in the cache.
        conv_kernel_size: the width of the convolution.

    Returns:
        The inputs (batch, dim, conv_kernel_size - 1) left of the convolution, and the recurrent state (batch, dim,
        dstate); both None when the sequence starts here. With gradients off the state is the cache's own tensor.
    """
    if cache is None:
        return None, None
    layer = cache.layers[layer_idx]
    _replace_unwritable(layer)
    context = state = None
    # A cache that was reset still has its tensors.
    if layer.has_previous_state[0]:
        window, state = layer.conv_states[0], layer.recurrent_states[0]
        # The cache keeps one column more than the convolution looks back, or everything while it records the past.
        width = conv_kernel_size - 1
        context = window[..., max(window.shape[-1] - width, 0) :]
        if context.shape[-1] < width:
            context = F.pad(context, (width - context.shape[-1], 0))
    if torch.is_grad_enabled():
        context = None if context is None else context.clone()
        state = None if state is None else state.clone()
    return context, state


def _replace_unwritable(layer: Any) -> None:
    """Replace tensors that the update must not write into: a user's own leaf, one of a finished inference mode."""
    # torch.compile cannot trace a question about inference mode.
    outside = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    for states in (layer.conv_states, layer.recurrent_states):
        for index, state in states.items():
            if state is None:
                continue
            if (state.is_leaf and state.requires_grad) or (outside and state.is_inference()):
                states[index] = state.clone()

"""Where a batch is padded, and what that means for tensors along time."""

from __future__ import annotations

import torch
from torch import Tensor

# As a time step: its softplus is exactly zero whatever the bias, and every half type can hold it.
CLOSED = -1e4


def find_pads(attention_mask: Tensor | None, batch: int, seqlen: int) -> Tensor | None:
    """Where the pads are, (batch, seqlen, 1), or None when there are none.

    A mask of ones is recognised, and then costs nothing, only where looking is free: not on a GPU, which would have to
    be waited for, and not while a graph is being traced.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seqlen:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, seqlen) = {(batch, seqlen)}.\n"
            "  The mask marks the pads of the hidden states. Pass one column per token, or None when there are no pads."
        )
    # The tokens at hand are the last ones of a mask that covers the cached tokens too.
    attention_mask = attention_mask[:, attention_mask.shape[1] - seqlen :]
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return (attention_mask == 0).unsqueeze(-1)


def place_conv_state(conv_state: Tensor, x: Tensor, pads: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put learned inputs of the convolution right before the first token of every row.

    Args:
        conv_state: (dim, width - 1) or (batch, dim, width - 1), oldest first.
        x: (batch, dim, seqlen), zero at pads.
        pads: (batch, seqlen, 1), or None.

    Returns:
        The inputs (batch, dim, width - 1) left of x, and x. In a row that begins with pads the learned inputs take
        the place of the last ones, and zeros go to the left.
    """
    batch, dim, seqlen = x.shape
    context = conv_state.to(x.dtype).expand(batch, -1, -1)
    if pads is None:
        return context, x
    width = context.shape[-1]
    leading = pads.squeeze(-1).long().cumprod(1).sum(1, keepdim=True)
    place = torch.arange(width + seqlen, device=x.device).expand(batch, -1)
    # Of [learned inputs, pads, tokens] the first two change places.
    source = torch.where(place < leading, place + width, torch.where(place < leading + width, place - leading, place))
    source = source.unsqueeze(-1).expand(-1, -1, dim)
    moved = torch.cat([context.transpose(1, 2), x.transpose(1, 2)], dim=1).gather(1, source).transpose(1, 2)
    return moved[..., :width], moved[..., width:]

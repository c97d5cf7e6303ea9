"""Positions of tokens that continue a cache, where transformers has them start again from zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def continue_positions(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], inputs: Tensor
) -> tuple[tuple, dict[str, Any]] | None:
    """Have Bamba count on from what its cache holds, as other models do by themselves.

    Args:
        model: a transformers model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inputs: (batch, seqlen, ...), its tokens or their embeddings, which are among these.

    Returns:
        The arguments to go on with, or None to leave them as they are.
    """
    cache = kwargs.get("past_key_values")
    if model.config.model_type != "bamba" or cache is None or kwargs.get("position_ids") is not None:
        return None
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + inputs.shape[1], device=inputs.device)
    return args, {**kwargs, "position_ids": positions.unsqueeze(0)}

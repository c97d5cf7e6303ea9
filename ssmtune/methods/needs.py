"""What a method needs of a model: each of these says why a model cannot be trained so, or None if it can.

They look at the model itself, so that a family which is supported later is offered the methods that fit it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Need = Callable[["nn.Module"], "str | None"]


def nothing(model: nn.Module) -> str | None:
    """Fits every model."""
    return None


def state_mixers(model: nn.Module) -> str | None:
    """Recurrent mixers that ssmtune drives."""
    from ssmtune.mixers import find_mixers

    return None if find_mixers(model) else "it has no recurrent mixer that ssmtune drives"


def extra_states(model: nn.Module) -> str | None:
    """Recurrent mixers that ssmtune drives, which take states beside their own."""
    from ssmtune.mixers import find_mixers, patched_class

    reasons = [patched_class(mixer).why_no_extra_states for _, mixer in find_mixers(model)]
    return next(filter(None, reasons), None) or state_mixers(model)


def keys_and_values(model: nn.Module) -> str | None:
    """Attention in every layer, for all of which a cache holds keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if "past_key_values" in inspect.signature(model.forward).parameters:
        layers = DynamicCache(config=model.config).layers
        if layers and all(isinstance(layer, DynamicLayer) for layer in layers):
            return None
    return "not every layer of it is attention"


def state_mixers_or_attention(model: nn.Module) -> str | None:
    """Recurrent mixers that ssmtune drives, or attention in every layer."""
    reasons = [need(model) for need in (state_mixers, keys_and_values)]
    return None if None in reasons else ", and ".join(reasons)


def modules(*names: str) -> Need:
    """A need: a module with one of these as the last part of its name."""

    def need(model: nn.Module) -> str | None:
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return None if there.intersection(names) else f"it has no module {' or '.join(names)}"

    return need


def parameters(expression: str, what: str) -> Need:
    """A need: a parameter whose name a regular expression is found in; `what` names it in words."""

    def need(model: nn.Module) -> str | None:
        return None if any(re.search(expression, name) for name, _ in model.named_parameters()) else f"it has no {what}"

    return need

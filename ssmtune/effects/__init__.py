"""What a method changes besides the score of its task: a small module each, whose `measure` is asked on every final run
and on the base. None is the answer where it does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ssmtune.effects.context import Context

# In the order in which they are measured: switching leaves a second adapter behind.
EFFECTS = {
    "forgetting": "rise of the loss on held-out text",
    "length": "perplexity of held-out text beyond the length of training",
    "ood": "telling inputs of other kinds, by maximum softmax and energy; choice tasks",
    "switching": "time to change to another adapter",
}


def measure_effects(model: nn.Module, context: Context, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """The effects of those names."""
    # only now: their modules import torch
    return {name: import_module(f"ssmtune.effects.{name}").measure(model, context) for name in EFFECTS if name in names}

"""Virtual tokens in front of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

VIRTUAL_TOKENS = 16


def prompt_tuning(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train vectors in front of the embeddings of a text."""
    from ssmtune.prompt_tuning import add_prompt

    return add_prompt(model, options.get("virtual_tokens", VIRTUAL_TOKENS))


PROMPT_METHODS = (
    Method("prompt-tuning", "Prompt tuning", 2e-2, "prompt", prompt_tuning, ("virtual_tokens",)),
)  # fmt: skip

"""Virtual tokens in front of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError
from ssmtune.methods.method import Method
from ssmtune.methods.needs import state_mixers_or_attention

if TYPE_CHECKING:
    from torch import nn

VIRTUAL_TOKENS = 16


def prompt_tuning(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train vectors in front of the embeddings of a text."""
    from ssmtune.prompt_tuning import add_prompt

    return add_prompt(model, options.get("virtual_tokens", VIRTUAL_TOKENS))


def p_tuning(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train such vectors through an MLP."""
    from ssmtune.prompt_tuning import add_encoded_prompt

    return add_encoded_prompt(model, options.get("virtual_tokens", VIRTUAL_TOKENS), options.get("reparametrize"))


def prefix_tuning(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train vectors that enter every mixer before a text, first as what it sees of random tokens there.

    Where all layers are attention, they are keys and values.
    """
    import torch

    from ssmtune.methods.states import add_initial_state
    from ssmtune.mixers import find_mixers
    from ssmtune.prompt_tuning import add_prefix
    from ssmtune.tuners.initial_state import prefix_from_tokens

    count = options.get("virtual_tokens", VIRTUAL_TOKENS)
    if not find_mixers(model):
        if options.get("layers") is not None:
            raise ConfigError(
                f"prefix-tuning: a cache of {type(model).__name__} has a prefix in all layers or in none.\n"
                "  Leave --method.layers out."
            )
        return add_prefix(model, count, options.get("reparametrize"))
    adapted = add_initial_state(model, {**options, "virtual_tokens": count})
    tokens = torch.randint(model.config.vocab_size, (1, count)).to(model.get_input_embeddings().weight.device)
    prefix_from_tokens(adapted, tokens)
    return adapted


PROMPT_METHODS = (
    Method("prompt-tuning", "Prompt tuning", 2e-2, "prompt", prompt_tuning, ("virtual_tokens",)),
    Method("p-tuning", "P-tuning", 1e-3, "prompt", p_tuning, ("virtual_tokens", "reparametrize")),
    Method(
        "prefix-tuning",
        "Prefix tuning",
        2e-2,
        "prompt",
        prefix_tuning,
        ("virtual_tokens", "reparametrize", "layers"),
        state_mixers_or_attention,
    ),
)

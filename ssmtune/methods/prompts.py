"""Virtual tokens in front of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError
from ssmtune.methods.method import Method
from ssmtune.methods.needs import state_mixers, state_mixers_or_attention

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
    from ssmtune.methods.states import add_initial_state
    from ssmtune.mixers import find_mixers
    from ssmtune.prompt_tuning import add_prefix

    if find_mixers(model):
        return _from_random_tokens(model, options, add_initial_state)
    if options.get("layers") is not None:
        raise ConfigError(
            f"prefix-tuning: a cache of {type(model).__name__} has a prefix in all layers or in none.\n"
            "  Leave --method.layers out."
        )
    return add_prefix(model, options.get("virtual_tokens", VIRTUAL_TOKENS), options.get("reparametrize"))


def prefix_tuning_mlp(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train such vectors through an MLP, of half the model's hidden size unless told otherwise."""
    return prefix_tuning(model, {"reparametrize": max(1, model.config.hidden_size // 2), **options})


def iterative_suffix(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train vectors that every mixer reads after each token and forgets again, first likewise."""
    from ssmtune.methods.states import add_state_offset

    return _from_random_tokens(model, options, add_state_offset)


def _from_random_tokens(model: nn.Module, options: Mapping[str, Any], add: Callable) -> nn.Module:
    import torch

    from ssmtune.tuners.virtual_tokens import start_from_tokens

    count = options.get("virtual_tokens", VIRTUAL_TOKENS)
    adapted = add(model, {**options, "virtual_tokens": count})
    tokens = torch.randint(model.config.vocab_size, (1, count)).to(model.get_input_embeddings().weight.device)
    start_from_tokens(adapted, tokens)
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
    Method(
        "prefix-tuning-mlp",
        "Prefix tuning through an MLP",
        2e-2,
        "prompt",
        prefix_tuning_mlp,
        ("virtual_tokens", "reparametrize", "layers"),
        state_mixers_or_attention,
    ),
    Method(
        "iterative-suffix",
        "Iterative suffix tuning",
        2e-2,
        "prompt",
        iterative_suffix,
        ("virtual_tokens", "reparametrize", "layers"),
        state_mixers,
    ),
)

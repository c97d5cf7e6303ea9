"""Going on from a cache with gradients: which models can, how a cache is forked, and its states as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from .packing import check_patched


def check_continues(model: nn.Module, given: str) -> None:
    """Refuse a model that would silently start from nothing where it is to go on from a cache.

    Raises:
        ValueError: a mixer is not patched, or gradient checkpointing would drop the cache.
    """
    check_patched(model, given, "drop the state that a cache holds")
    if drops_caches(model):
        raise ValueError(
            f"{type(model).__name__} got {given} under gradient checkpointing, where transformers drops every cache.\n"
            "  Each part would start from nothing. Switch gradient checkpointing off; ssmtune.patch(model, "
            "recompute='scan') saves memory too."
        )


def drops_caches(model: nn.Module) -> bool:
    """Whether transformers runs the model without a cache: in training under gradient checkpointing."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def fork_cache(cache: Cache, copies: int) -> Cache:
    """Give every row of a cache so many continuations, one next to the other.

    The cache itself stays as it is, whatever is done with the fork; gradients flow back into it.
    """
    forked = copy(cache)
    forked.layers = []
    for layer in cache.layers:
        forked.layers.append(copy(layer))
        vars(forked.layers[-1]).update((name, _repeat(value, copies)) for name, value in vars(layer).items())
    return forked


def _repeat(value: Any, copies: int) -> Any:
    if isinstance(value, dict):
        return {key: _repeat(entry, copies) for key, entry in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.repeat_interleave(copies, dim=0)
    return value


def holds_states_alone(cache: Cache) -> bool:
    """Whether a cache is of one size however long the sequence: without the keys and values of attention layers."""
    return all(type(layer) is LinearAttentionLayer for layer in cache.layers)


def states_of(cache: Cache) -> list[Tensor]:
    """What a cache of mixers holds: of each layer the window of the convolution, then the recurrent state."""
    return [states[0] for layer in cache.layers for states in (layer.conv_states, layer.recurrent_states)]


def cache_of(config: PreTrainedConfig, states: Sequence[Tensor] | None) -> DynamicCache:
    """A cache with copies of what `states_of` gave, into which gradients flow back; None for an empty one."""
    cache = DynamicCache(config=config)
    for index, (window, state) in enumerate(zip(states[::2], states[1::2], strict=True) if states else ()):
        cache.update_conv_state(window, index, conv_kernel_size=window.shape[-1])
        cache.update_recurrent_state(state, index)
    return cache

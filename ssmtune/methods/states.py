"""The state-based methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method
from ssmtune.methods.needs import state_mixers

if TYPE_CHECKING:
    from torch import nn

LOW_RANK = 4


def add_initial_state(model: nn.Module, options: Mapping[str, Any], adapter_name: str = "default") -> nn.Module:
    """Let every sequence start from a trained state."""
    from peft import get_peft_model

    from ssmtune.tuners import InitialStateConfig

    return get_peft_model(model, InitialStateConfig(**_settings(options)), adapter_name=adapter_name)


def add_state_offset(
    model: nn.Module, options: Mapping[str, Any], adapter_name: str = "default", **settings: Any
) -> nn.Module:
    """Add a trained offset to the state where it is read; `settings` go to StateOffsetConfig."""
    from peft import get_peft_model

    from ssmtune.tuners import StateOffsetConfig

    return get_peft_model(model, StateOffsetConfig(**settings | _settings(options)), adapter_name=adapter_name)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"layers": "layers_to_transform"}
    return {"task_type": "CAUSAL_LM"} | {renamed.get(key, key): value for key, value in options.items()}


_OPTIONS = ("rank", "alpha", "dropout", "layers", "reparametrize")

STATE_METHODS = (
    Method(
        "initial-state", "Initial State Tuning", 2e-3, "state",
        add_initial_state, (*_OPTIONS, "conv_state", "inference_scale"), state_mixers,
    ),
    Method("state-offset", "State-offset Tuning (h)", 2e-4, "state", add_state_offset, _OPTIONS, state_mixers),
    Method(
        "state-offset-low-rank", "State-offset Tuning (h), low rank", 1e-3, "state",
        partial(add_state_offset, rank=LOW_RANK), ("rank", "alpha", "dropout", "layers"), state_mixers,
    ),
    Method(
        "state-offset-y", "State-offset Tuning (y)", 1e-3, "state",
        partial(add_state_offset, target="y"), ("layers", "reparametrize"), state_mixers,
    ),
)  # fmt: skip

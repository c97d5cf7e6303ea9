"""Changes to the state space itself: its states, and what they decay, read and are read by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method
from ssmtune.methods.needs import extra_states, modules

if TYPE_CHECKING:
    from torch import nn


def add_states(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Give every channel trained states beside its own."""
    from peft import get_peft_model

    from ssmtune.tuners import AdditionalScanConfig

    return get_peft_model(model, AdditionalScanConfig(**_settings(options)))


def train_dimensions(model: nn.Module, options: Mapping[str, Any], adapter_name: str = "default") -> nn.Module:
    """Train some channels and states of A, B and C, which a first part of training chooses."""
    from peft import get_peft_model

    from ssmtune.tuners import SparseDimensionConfig

    return get_peft_model(model, SparseDimensionConfig(**_settings(options)), adapter_name=adapter_name)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"extra_states": "states", "layers": "layers_to_transform"}
    return {"task_type": "CAUSAL_LM"} | {renamed.get(key, key): value for key, value in options.items()}


SDT_OPTIONS = ("channels", "states", "warm_up_steps", "layers")


STATE_SPACE_METHODS = (
    Method("additional-scan", "Additional-scan", 4e-3, "state", add_states, ("extra_states", "layers"), extra_states),
    Method(
        "sdt",
        "Sparse dimension tuning",
        1e-3,
        "weights",
        train_dimensions,
        SDT_OPTIONS,
        modules("x_proj"),
    ),
)

"""Changes to the state space itself: its states, and what they decay, read and are read by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method
from ssmtune.methods.needs import state_mixers

if TYPE_CHECKING:
    from torch import nn


def add_states(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Give every channel trained states beside its own."""
    from peft import get_peft_model

    from ssmtune.tuners import AdditionalScanConfig

    renamed = {"extra_states": "states", "layers": "layers_to_transform"}
    settings = {renamed[key]: value for key, value in options.items()}
    return get_peft_model(model, AdditionalScanConfig(task_type="CAUSAL_LM", **settings))


STATE_SPACE_METHODS = (
    Method("additional-scan", "Additional-scan", 4e-3, "state", add_states, ("extra_states", "layers"), state_mixers),
)

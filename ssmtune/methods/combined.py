"""Two adapters in one model, trained together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.methods.low_rank import add_lora
from ssmtune.methods.method import Method
from ssmtune.methods.needs import modules, state_mixers
from ssmtune.methods.state_space import SDT_OPTIONS, train_dimensions
from ssmtune.methods.states import add_initial_state, add_state_offset

if TYPE_CHECKING:
    from torch import nn

# peft stores the adapter named "default" in a folder itself, any other in a folder of its name in there.
SECOND = "beside"
# Sparse dimension tuning is for the state space, LoRA beside it for the projections around it; peft refuses out_proj.
PROJECTION = ("in_proj",)


def lora_and_state_offset(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """LoRA on the projections, and an offset of the state; the options are those of LoRA, `layers` of both."""
    add_lora(model, options)
    return add_state_offset(model, _layers(options), SECOND)


def initial_state_and_state_offset(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """A trained initial state, and an offset of the state."""
    add_initial_state(model, options)
    return add_state_offset(model, _layers(options), SECOND)


def lora_and_sdt(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """LoRA on the first projection, and some dimensions of the state space; `layers` of both."""
    dimensions = {key: value for key, value in options.items() if key in SDT_OPTIONS}
    add_lora(model, options, PROJECTION)
    return train_dimensions(model, dimensions, SECOND)


def _layers(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key == "layers"}


COMBINED_METHODS = (
    Method(
        "lora+state-offset", "LoRA and State-offset Tuning (h)", 1e-3, "weights", lora_and_state_offset,
        ("rank", "alpha", "dropout", "target_modules", "layers"), state_mixers,
    ),
    Method(
        "lora+sdt", "LoRA and sparse dimension tuning", 1e-3, "weights", lora_and_sdt,
        ("rank", "alpha", "dropout", *SDT_OPTIONS), modules("x_proj"),
    ),
    Method(
        "initial-state+state-offset", "Initial State and State-offset Tuning (h)", 5e-4, "state",
        initial_state_and_state_offset, ("layers", "conv_state"), state_mixers,
    ),
)  # fmt: skip

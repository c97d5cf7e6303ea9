"""Factors on activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

# What a Mamba mixer has in the place of keys, values and the inner activations of a feed-forward layer: the outputs of
# the first projection, and the inputs of the last.
MIXER_TARGETS = ("in_proj", "out_proj")


def known_to_peft(model: nn.Module) -> bool:
    """Whether peft has a list of the modules of this architecture that IA3 rescales."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    return model.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING


def keys_or_projections(model: nn.Module) -> str | None:
    """A need: an architecture that peft knows, or the projections of a mixer."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if known_to_peft(model) or present.issuperset(MIXER_TARGETS):
        return None
    return f"peft does not say which modules of a {model.config.model_type} it rescales"


def add_ia3(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train factors on keys, values and the inner activations of feed-forward layers, or on what is in their place.

    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022.
    """
    from peft import IA3Config, get_peft_model

    modules = {} if known_to_peft(model) else {
        "target_modules": list(MIXER_TARGETS), "feedforward_modules": list(MIXER_TARGETS[1:])
    }  # fmt: skip
    return get_peft_model(model, IA3Config(task_type="CAUSAL_LM", **modules))


# The rate is that of the authors' configuration, github.com/r-three/t-few, configs/ia3.json.
RESCALING_METHODS = (Method("ia3", "IA3", 3e-3, "weights", add_ia3, needs=keys_or_projections),)

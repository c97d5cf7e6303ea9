"""The fine-tuning methods by name, each with its own default learning rate.

The rates of the methods differ by orders of magnitude, so one shared default would decide every comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError, MethodConfig, nearest
from ssmtune.methods.combined import COMBINED_METHODS
from ssmtune.methods.low_rank import LOW_RANK_METHODS
from ssmtune.methods.method import Method
from ssmtune.methods.own_weights import OWN_WEIGHT_METHODS
from ssmtune.methods.prompts import PROMPT_METHODS
from ssmtune.methods.rescaling import RESCALING_METHODS
from ssmtune.methods.state_space import STATE_SPACE_METHODS
from ssmtune.methods.states import STATE_METHODS

if TYPE_CHECKING:
    from torch import nn

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *OWN_WEIGHT_METHODS,
        *LOW_RANK_METHODS,
        *RESCALING_METHODS,
        *PROMPT_METHODS,
        *STATE_METHODS,
        *STATE_SPACE_METHODS,
        *COMBINED_METHODS,
    )
}

# What a comparison runs unless told otherwise: one of each sort.
CORE_METHODS = ("full", "lora", "prompt-tuning", "initial-state", "state-offset", "state-offset-y")


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}{nearest(name, METHODS)}\n  Methods: {', '.join(METHODS)}.")
    return METHODS[name]


def register_method(method: Method) -> None:
    """Make a method known by its name, to `--methods` and everything else.

    Raises:
        ConfigError: another method has the name.
    """
    known = METHODS.setdefault(method.name, method)
    if known is not method:
        raise ConfigError(f"there is a method {method.name!r} already: {known.title}.\n  Take another name.")


def method_options(config: MethodConfig) -> dict[str, Any]:
    """The options given for a method.

    Raises:
        ConfigError: an option was given that the method does not have.
    """
    method = get_method(config.name)
    given = {key: value for key, value in vars(config).items() if key != "name" and value is not None}
    _reject_foreign(method, given)
    return given


def apply_method(model: nn.Module, name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Make a model ready to be trained with one method.

    Args:
        model: a causal language model, changed in place.
        name: a key of METHODS.
        options: values for the method's options; the rest take their defaults.
        seed: of what is initialised at random (LoRA's first factor, a low-rank state, virtual tokens).

    Returns:
        The model to train: a PeftModel, or the model itself for `full`.

    Raises:
        ConfigError: an unknown method, an option that it does not have, or a model that it does not fit.
    """
    import torch

    from ssmtune.models import quiet_peft

    method = get_method(name)
    options = {key: value for key, value in (options or {}).items() if value is not None}
    _reject_foreign(method, options)
    if (reason := method.needs(model)) is not None:
        fitting = ", ".join(other.name for other in METHODS.values() if other.needs(model) is None)
        raise ConfigError(
            f"method {name!r} does not apply to {type(model).__name__}: {reason}.\n  Methods that do: {fitting}."
        )
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(seed)
        return method.apply(model, options)


def _reject_foreign(method: Method, options: Mapping[str, Any]) -> None:
    foreign = [key for key in options if key not in method.options]
    if foreign:
        own = ", ".join(method.options) or "none"
        raise ConfigError(
            f"method {method.name!r} has no option {', '.join(map(repr, foreign))}.\n"
            f"  Its options: {own}. Remove the rest."
        )

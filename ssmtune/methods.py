"""The fine-tuning methods by name, each with its own default learning rate.

The rates of the methods differ by orders of magnitude, so one shared default would decide every comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.config import ConfigError, MethodConfig, nearest
from ssmtune.models import quiet_peft

if TYPE_CHECKING:
    from torch import nn

# The projections of a Mamba mixer in which LoRA trains: a patched mixer calls each of them as a module.
# out_proj is left out because peft refuses it on Mamba.
LORA_TARGETS = ("in_proj", "x_proj", "dt_proj")
LORA_RANK = 8
VIRTUAL_TOKENS = 16


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: what configurations and the command line call it.
        title: what tables and pictures call it.
        default_lr: the peak learning rate with AdamW.
        kind: what is trained: added states, a prompt, changes to weights, or every weight.
        options: the keys of MethodConfig that mean something to it.
    """

    name: str
    title: str
    default_lr: float
    kind: Literal["state", "prompt", "weights", "full"]
    options: tuple[str, ...] = ()


_STATE_OPTIONS = ("rank", "alpha", "dropout", "layers", "reparametrize")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "Full fine-tuning", 4e-4, "full"),
        Method("lora", "LoRA", 2e-3, "weights", ("rank", "alpha", "dropout", "target_modules", "layers")),
        Method("prompt-tuning", "Prompt tuning", 2e-2, "prompt", ("virtual_tokens",)),
        Method("initial-state", "Initial State Tuning", 2e-3, "state", (*_STATE_OPTIONS, "conv_state")),
        Method("state-offset", "State-offset Tuning (h)", 2e-4, "state", _STATE_OPTIONS),
        Method("state-offset-y", "State-offset Tuning (y)", 1e-3, "state", ("layers", "reparametrize")),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}{nearest(name, METHODS)}\n  Methods: {', '.join(METHODS)}.")
    return METHODS[name]


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
        seed: of what is initialised at random (LoRA's first factor, a low-rank state, the prompt).

    Returns:
        The model to train: a PeftModel, or the model itself for `full`.

    Raises:
        ConfigError: an unknown method or an option that it does not have.
    """
    import torch

    method = get_method(name)
    options = {key: value for key, value in (options or {}).items() if value is not None}
    _reject_foreign(method, options)
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(seed)
        if method.kind == "full":
            model.requires_grad_(True)
            return model
        return _apply_peft(model, method, options)


def _apply_peft(model: nn.Module, method: Method, options: Mapping[str, Any]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if method.name == "prompt-tuning":
        from ssmtune.prompt_tuning import add_prompt

        return add_prompt(model, options.get("virtual_tokens", VIRTUAL_TOKENS))
    if method.name == "lora":
        rank = options.get("rank", LORA_RANK)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=options.get("alpha", rank),
            lora_dropout=options.get("dropout", 0.0),
            target_modules=list(options.get("target_modules") or lora_targets(model)),
            layers_to_transform=options.get("layers"),
        )
        return get_peft_model(model, config)

    from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

    shared = {"task_type": "CAUSAL_LM"}
    if "layers" in options:
        shared["layers_to_transform"] = options["layers"]
    shared |= {key: value for key, value in options.items() if key != "layers"}
    if method.name == "initial-state":
        return get_peft_model(model, InitialStateConfig(**shared))
    target = "y" if method.name == "state-offset-y" else "h"
    return get_peft_model(model, StateOffsetConfig(target=target, **shared))


def lora_targets(model: nn.Module) -> list[str]:
    """The projections of this model's mixers that LoRA adapts unless told otherwise."""
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGETS if name in present]
    if not targets:
        raise ConfigError(
            f"lora: none of {', '.join(LORA_TARGETS)} is in {type(model).__name__}.\n"
            "  These are the projections of a Mamba mixer. Name the modules with --method.target_modules."
        )
    return targets


def _reject_foreign(method: Method, options: Mapping[str, Any]) -> None:
    foreign = [key for key in options if key not in method.options]
    if foreign:
        own = ", ".join(method.options) or "none"
        raise ConfigError(
            f"method {method.name!r} has no option {', '.join(map(repr, foreign))}.\n"
            f"  Its options: {own}. Remove the rest."
        )

"""Finds trainable tensors that training would never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ssmtune.mixers import supports
from ssmtune.mixers.selective_mixer import SelectiveMixer

_NAMED_IN_REPORT = 3


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` found; `str()` is one line if all is well, else a warning with the likely reason.

    Args:
        total: how many tensors are trainable.
        dead: the names of those that got no gradient.
        places: for each dead tensor, its module and its own name, as a user would write them.
        reason: why, with what to do about it.
    """

    total: int
    dead: tuple[str, ...] = ()
    places: tuple[tuple[str, str], ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.dead

    def __str__(self) -> str:
        if self.ok:
            return f"all {self.total} trainable tensors received a gradient"
        modules: dict[str, list[str]] = {}
        for module, tensor in self.places:
            modules.setdefault(module, []).append(tensor)
        listed = [f"{module} ({', '.join(tensors)})" for module, tensors in modules.items()]
        more = ", …" if len(listed) > _NAMED_IN_REPORT else ""
        return (
            f"warning: {len(self.dead)} of {self.total} trainable tensors received no gradient: "
            f"{', '.join(listed[:_NAMED_IN_REPORT])}{more}\n  {self.reason}"
        )


def check_gradients(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> GradientReport:
    """Report the trainable tensors that one training step on a batch would leave as they are.

    A tensor whose gradient is None does not take part in the loss. A gradient of zeros does not yet mean that: while
    LoRA's B is zero, as at the start, so is the gradient of its A. If any is all zeros the step is therefore repeated
    with a little noise in the trainable tensors that are all zeros, and only what still gets zeros is reported.

    Gradients, weights, random number generators and the training mode of every module are as before afterwards.

    Args:
        model: a model that returns a loss.
        batch: its inputs, with labels; moved to the device of the model.

    Raises:
        ValueError: nothing is trainable, or the model returned no loss.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no trainable tensor.\n"
            "  Its adapters are frozen or disabled. Load them with is_trainable=True, or activate one by set_adapter."
        )
    with _left_as_before(model):
        _one_step(model, batch)
        if any(parameter.grad is not None and not parameter.grad.any() for parameter in names):
            with _noise_for_zeros(list(names)):
                _one_step(model, batch)
        unused = [name for parameter, name in names.items() if parameter.grad is None]
        zero = [name for parameter, name in names.items() if parameter.grad is not None and not parameter.grad.any()]
    dead = tuple(unused + zero)
    return GradientReport(
        total=len(names),
        dead=dead,
        places=tuple(_place(model, name) for name in dead),
        reason=_reason(model, unused) if dead else "",
    )


def _one_step(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    output = model(**{key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()})
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}.\n"
            "  Gradients are those of the loss. Add labels to the batch."
        )
    if loss.requires_grad:
        loss.backward()


@contextmanager
def _left_as_before(model: nn.Module) -> Iterator[None]:
    """Give back the training modes, gradients and random number generators after the body."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    devices = {parameter.device.index for parameter in gradients if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            model.train()
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


@contextmanager
def _noise_for_zeros(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Put noise into the parameters that are all zeros, for the time of the body."""
    zeros = [parameter for parameter in parameters if not parameter.any()]
    with torch.no_grad():
        for parameter in zeros:
            parameter.normal_(std=1e-2)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _place(model: nn.Module, name: str) -> tuple[str, str]:
    """Split a parameter's name into the module it adapts or belongs to and the name of the tensor there."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), BaseTunerLayer):
            module, tensor = parts[:end], parts[end]
            break
    else:
        module, tensor = parts[:-1], parts[-1]
    return ".".join(module).removeprefix("base_model.model."), tensor


def _reason(model: nn.Module, unused: list[str]) -> str:
    """Explain the tensors that do not take part in the loss, or, if there are none, those whose gradient is zero."""
    modules = dict(model.named_modules())
    for name in unused:
        for mixer_name in _ancestors(name):
            mixer = modules.get(mixer_name)
            if mixer is None or not supports(mixer) or isinstance(mixer, SelectiveMixer):
                continue
            child = name[len(mixer_name) + 1 :].split(".")[0]
            return (
                f"transformers reads {child}.weight directly, so an adapter there has no effect.\n"
                f"  Call ssmtune.patch(model), under which it has one, or remove {child} from target_modules."
            )
    if unused:
        return "They do not reach the loss. Check that the modules they belong to are called in training."
    return "Their gradients are zero on this batch. Check that it uses them, and that numbers do not underflow."


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name

"""Putting the operators into a model: each supported mixer instance changes its class, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MethodType

from torch import nn

from ssmtune.ops import backends

from .packing import install_packing, remove_packing
from .registry import PATCHED_CLASSES, full_name, is_known, patched_class
from .selective_mixer import SelectiveMixer
from .state_inputs import StateAdapter

RECOMPUTE = ("nothing", "cheap", "scan")


@dataclass(frozen=True)
class PatchSummary:
    """What `patch` did; `str()` gives `24 mixers -> cpu`.

    Args:
        names: the patched mixers, by their names in the model.
        backend: the backend that runs a scan on the model's device.
        skipped: the mixers left alone, by name, with the reason.
    """

    names: tuple[str, ...]
    backend: str
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        line = f"{len(self.names)} mixer{'' if len(self.names) == 1 else 's'} -> {self.backend}"
        if self.skipped:
            name, reason = next(iter(self.skipped.items()))
            line += f" ({len(self.skipped)} left alone: {name}: {reason})"
        return line


def patch(model: nn.Module, *, recompute: str | None = None) -> PatchSummary:
    """Run the mixers of this model on the operators of ssmtune.

    Only these instances change: other models, transformers itself, parameters and state dict keys stay as they are.
    Patching twice is patching once. Wrappers such as a `PeftModel` are looked through. Sequences packed into one row
    are kept apart, as `ssmtune.mixers.packing` says, by calls of the model itself; to call its `forward` leaves that
    out.

    Args:
        model: a model, or any module, with Mamba mixers in it.
        recompute: what a training step makes again in its backward pass rather than keep. "cheap": the output of the
            convolution and the time step. "scan": the scan too, so that a layer keeps another 10 to 40 % less, for a
            few percent of time. "nothing": a few percent faster where layers are narrow. None leaves mixers that are
            patched already as they are; for others it is "cheap".

    Returns:
        A summary that prints as `24 mixers -> cpu`.

    Raises:
        ValueError: no mixer can be patched, or `recompute` has another value.
        RuntimeError: the backend asked for, as through SSMTUNE_BACKEND, cannot run on the model's device.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
        >>> print(ssmtune.patch(model))
        24 mixers -> cpu
    """
    if recompute not in (None, *RECOMPUTE):
        raise ValueError(
            f"recompute is {recompute!r}, expected {', '.join(map(repr, RECOMPUTE))} or None.\n"
            "  It says what a training step makes again in its backward pass. Leave it out for 'cheap'."
        )
    skipped = {}
    for name, module in model.named_modules():
        reason = _reason_to_skip(module)
        if reason is not None:
            skipped[name] = reason
    mixers = find_mixers(model)
    if not mixers:
        raise ValueError(_nothing_to_patch(model, skipped))
    first = mixers[0][1]
    backend = backends.choose(patched_class(first).kernel, first.conv1d.weight.device, first.conv1d.weight.dtype)
    for _, mixer in mixers:
        patch_mixer(mixer)
        if recompute is not None:
            mixer.recompute = recompute
    install_packing(model)
    return PatchSummary(tuple(name for name, _ in mixers), backend, skipped)


def unpatch(model: nn.Module) -> int:
    """Give the mixers of this model back to the library they are of.

    Returns:
        How many were patched.

    Raises:
        ValueError: a mixer carries adapters, which without the patch it would silently ignore.
    """
    mixers = [module for _, module in find_mixers(model) if isinstance(module, SelectiveMixer)]
    for mixer in mixers:
        _check_unpatchable(mixer)
    unpatched = sum(unpatch_mixer(mixer) for mixer in mixers)
    remove_packing(model)
    return unpatched


def find_mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The mixers of a model that are patched or can be, with their names in it."""
    return [(name, module) for name, module in model.named_modules() if supports(module)]


def supports(module: nn.Module) -> bool:
    """Whether a module is a mixer that is patched or can be."""
    if isinstance(module, SelectiveMixer):
        return True
    return is_known(module) and not _has_own_forward(module)


def patch_mixer(module: nn.Module) -> bool:
    """Patch one mixer.

    Returns:
        Whether it changed: False when it was patched already.

    Raises:
        ValueError: the module is not a mixer that can be patched.
    """
    if isinstance(module, SelectiveMixer):
        return False
    if not supports(module):
        reason = _reason_to_skip(module) or "it is not a mixer"
        raise ValueError(
            f"cannot patch {type(module).__name__}: {reason}.\n"
            f"  Supported: {_supported()}. ssmtune.mixers.find_mixers(model) lists what a model has of them."
        )
    _swap_class(module, patched_class(module))
    return True


def unpatch_mixer(module: nn.Module) -> bool:
    """Give one mixer back to the library it is of.

    Returns:
        Whether it changed: False when it was not patched.

    Raises:
        ValueError: the mixer carries adapters, or is of a class derived from the patched one.
    """
    if not isinstance(module, SelectiveMixer):
        return False
    _check_unpatchable(module)
    module.__dict__.pop("recompute", None)
    _swap_class(module, module.original_class)
    return True


def _swap_class(mixer: nn.Module, new: type[nn.Module]) -> None:
    old = type(mixer)
    mixer.__class__ = new
    # accelerate's hooks keep the forward pass they wrap as a method bound before the swap, and leave it behind as an
    # attribute when they are removed.
    for name in ("forward", "_old_forward"):
        method = mixer.__dict__.get(name)
        if _is_method(method, mixer, old):
            mixer.__dict__[name] = MethodType(new.forward, mixer)


def _is_method(method: object, mixer: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(method, MethodType) and method.__self__ is mixer and method.__func__ is cls.forward


def _has_own_forward(mixer: nn.Module) -> bool:
    """Whether someone replaced the forward pass of this instance, so that swapping its class would change nothing."""
    inner = mixer.__dict__.get("_old_forward" if hasattr(mixer, "_hf_hook") else "forward")
    return inner is not None and not _is_method(inner, mixer, type(mixer))


def _check_unpatchable(mixer: nn.Module) -> None:
    adapters = [name for name, child in mixer.named_children() if isinstance(child, StateAdapter)]
    if adapters:
        raise ValueError(
            f"cannot unpatch {type(mixer).__name__}: it carries the adapters {', '.join(adapters)}.\n"
            "  The mixer without a patch would ignore them. Unload them first, as with `model = model.unload()`."
        )
    if full_name(type(mixer)) not in PATCHED_CLASSES.values():
        raise ValueError(
            f"cannot unpatch {type(mixer).__name__}: it is derived from a patched class, so what it was is unknown.\n"
            "  Remove what derived it first, as with torch.nn.utils.parametrize.remove_parametrizations."
        )


def _reason_to_skip(module: nn.Module) -> str | None:
    """Why a mixer of a supported kind is left alone; None for other modules and for mixers that are not."""
    if isinstance(module, SelectiveMixer):
        return None
    kinds = [cls for cls in type(module).__mro__ if full_name(cls) in PATCHED_CLASSES]
    if not kinds:
        return None
    if type(module) is not kinds[0]:
        return f"{type(module).__name__} is a subclass of {kinds[0].__name__}, and may have a forward pass of its own"
    return "its forward pass was replaced on the instance" if _has_own_forward(module) else None


def _nothing_to_patch(model: nn.Module, skipped: dict[str, str]) -> str:
    if skipped:
        name, reason = next(iter(skipped.items()))
        found = f"all {len(skipped)} are left alone; {name}: {reason}"
    else:
        blocks = Counter(type(module).__name__ for module in model.modules() if next(module.children(), None))
        likely = {name: n for name, n in blocks.items() if "mamba" in name.lower() or "mixer" in name.lower()}
        listed = [f"{name} ({n})" for name, n in (likely or blocks).items()]
        found = f"found {', '.join(listed[:6]) or 'no submodules'}{', ...' if len(listed) > 6 else ''}"
    return f"{type(model).__name__} has no mixer to patch: {found}.\n  Supported: {_supported()}."


def _supported() -> str:
    names: dict[str, list[str]] = {}
    for full in PATCHED_CLASSES:
        names.setdefault(full.partition(".")[0], []).append(full.rpartition(".")[2])
    return "; ".join(f"{', '.join(classes)} of {library}" for library, classes in names.items())

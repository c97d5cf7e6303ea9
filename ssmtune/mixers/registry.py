"""Which mixers are driven, and by which classes here."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from .selective_mixer import SelectiveMixer

# Those of transformers by the folder in `transformers.models`, which is the name of the file here too.
_MIXERS = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "zamba": "ZambaMambaMixer",
    "mamba2": "Mamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
    "bamba": "BambaMixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
    "qwen4_exp": "Qwen4ExpTextGatedDeltaNet",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "kimi_linear": "KimiLinearDeltaAttention",
    "bailing_hybrid": "BailingHybridDeltaAttention",
    "glm5_next": "Glm5NextTextLinearAttention",
}
# By full name, so that recognising a mixer imports none of them.
PATCHED_CLASSES = {
    f"transformers.models.{model}.modeling_{model}.{mixer}": f"ssmtune.mixers.{model}.Patched{mixer}"
    for model, mixer in _MIXERS.items()
} | {
    "mamba_ssm.modules.mamba_simple.Mamba": "ssmtune.mixers.mamba_ssm_mamba.PatchedMamba",
    "mamba_ssm.modules.mamba2.Mamba2": "ssmtune.mixers.mamba_ssm_mamba2.PatchedMamba2",
}


def full_name(cls: type) -> str:
    """The name of a class with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_known(module: nn.Module) -> bool:
    """Whether a module is, to the class, a mixer that can be driven here."""
    return full_name(type(module)) in PATCHED_CLASSES


def patched_class(mixer: nn.Module) -> type[SelectiveMixer]:
    """The class that drives a mixer: its own if it is patched, else the one that it would get."""
    if isinstance(mixer, SelectiveMixer):
        return type(mixer)
    module_name, class_name = PATCHED_CLASSES[full_name(type(mixer))].rsplit(".", 1)
    return getattr(import_module(module_name), class_name)


def state_shape(mixer: nn.Module) -> tuple[int, ...]:
    """The axes of a mixer's state but for the batch: (dim, dstate), or with the channels of heads apart."""
    return patched_class(mixer).state_axes(mixer)

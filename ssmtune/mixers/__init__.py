"""How each model architecture drives the operators: one file per architecture, patched onto model instances."""

from .packing import install_packing, remove_packing
from .patching import PatchSummary, find_mixers, patch, patch_mixer, supports, unpatch, unpatch_mixer
from .registry import patched_class, state_shape
from .state_inputs import ExtraStates, StateAdapter, StateInputs

__all__ = [
    "ExtraStates",
    "PatchSummary",
    "StateAdapter",
    "StateInputs",
    "find_mixers",
    "install_packing",
    "patch",
    "patch_mixer",
    "patched_class",
    "remove_packing",
    "state_shape",
    "supports",
    "unpatch",
    "unpatch_mixer",
]

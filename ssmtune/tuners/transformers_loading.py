"""The checks of stored adapters for transformers' own `model.load_adapter`.

transformers puts stored tensors into a model without asking peft: what is missing or has no place it logs, what is NaN
it takes. It has no hook to add a check to, so its method is wrapped. Adapters of other methods pass through unchanged.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from ssmtune.tuners.adapter_file import check_readable, check_tensors
from ssmtune.tuners.mixer_tuner import MixerTunerModel


def check_what_transformers_loads() -> None:
    """Wrap `load_adapter` of transformers models, once."""
    original = PeftAdapterMixin.load_adapter
    if getattr(original, "checks_states", False):
        return

    @wraps(original)
    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        before = set(getattr(self, "peft_config", ()))
        try:
            folder = Path(peft_model_id or "", (kwargs.get("adapter_kwargs") or {}).get("subfolder") or "")
            if peft_model_id is not None:
                check_readable(folder)
            try:
                info = original(self, peft_model_id, *args, **kwargs)
            except RuntimeError:
                # It says no more than that shapes differ.
                for name, tuner in _added(self, before).items():
                    if (folder / "adapter_config.json").is_file():
                        weights = load_peft_weights(str(folder), device="cpu")
                        tuner._remap_adapter_state_dict_for_load(self, self.peft_config[name], name, weights)
                raise
            for name, tuner in _added(self, before).items():
                _check_loaded(self, tuner, name, info)
        except Exception:
            for name, tuner in _added(self, before).items():
                self.delete_adapter(name)
                tuner.remove_layers(self, unused_only=True)
            raise
        return info

    load_adapter.checks_states = True
    PeftAdapterMixin.load_adapter = load_adapter


def _added(model: nn.Module, before: set[str]) -> dict[str, type[MixerTunerModel]]:
    """The tuners of the state adapters that a model has now and had not before, by name."""
    tuners = {
        name: PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        for name, config in getattr(model, "peft_config", {}).items()
        if name not in before
    }
    return {name: tuner for name, tuner in tuners.items() if tuner and issubclass(tuner, MixerTunerModel)}


def _check_loaded(model: nn.Module, tuner: type[MixerTunerModel], name: str, info: Any) -> None:
    expected = tuner.stored_tensors(model, name)
    found = {key: tensor for key, tensor in expected.items() if key not in info.missing_keys}
    found |= {key.removesuffix(f".{name}"): torch.empty(0) for key in info.unexpected_keys}
    found |= {key: torch.empty(shape, device="meta") for key, shape, _ in info.mismatched_keys if key in expected}
    check_tensors(expected, found, tuner.prefix, model.peft_config[name].base_model_name_or_path)

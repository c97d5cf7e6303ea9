from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ssmtune.tuners.adapter_file import check_tensors
from ssmtune.tuners.weight_subset.config import WeightSubsetConfig

_WRAPPED = "base_model.model."


class WeightSubsetModel(BaseTuner):
    """The tuner of `WeightSubsetConfig`: it adds nothing to the model, and keeps what the tensors were before.

    `disable_adapter` and `unload` put those back, `merge_and_unload` leaves the trained ones. There is room for one
    such adapter on a model, since the tensors are the model's own.
    """

    prefix = "weight_subset_"
    tuner_layer_cls = BaseTunerLayer

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ) -> None:
        config = self.peft_config[adapter_name]
        if len(self.peft_config) > 1:
            del self.peft_config[adapter_name]
            self.add_adapter(adapter_name, config)
        chosen = selected(model, config)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(not config.inference_mode)
        self.originals = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        self.trained: dict[str, Tensor] | None = None

    def add_adapter(self, adapter_name: str, config: WeightSubsetConfig) -> None:
        """Refuse to: `PeftModel.add_adapter` comes here."""
        raise ValueError(
            f"cannot add {adapter_name!r}: {type(self.model).__name__} already has {', '.join(self.peft_config)}, and "
            "a subset of the weights is trained in place.\n"
            "  Load it on a model without adapters."
        )

    def _temporarily_active(self, adapter_name: str):
        """A context for peft to load tensors in: they are in the model anyway."""
        return nullcontext()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if (names := kwargs.get("adapter_names")) is not None:
            raise ValueError(
                f"adapter_names={names} cannot be used with a subset of weights: a batch shares them.\n"
                "  Run the rows of the base apart, within disable_adapter()."
            )
        yield

    def _create_and_replace(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} replaces no modules.")

    def disable_adapter_layers(self) -> None:
        """Put back what the tensors were before training."""
        if self.trained is None:
            self.trained = self._put(self.originals)

    def enable_adapter_layers(self) -> None:
        """Put the trained tensors back after `disable_adapter_layers`."""
        if self.trained is not None:
            self._put(self.trained)
            self.trained = None

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write these over the model's, and return what was there."""
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        return before

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self.enable_adapter_layers()
        else:
            self.disable_adapter_layers()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        del self.model.peft_config
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        return {name: state_dict[name] for name in selected(model, config)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        check_tensors(selected(model, config), state_dict, "", config.base_model_name_or_path, _place)
        return state_dict


def selected(model: nn.Module, config: WeightSubsetConfig) -> dict[str, nn.Parameter]:
    """The parameters that a config selects, by name; one that two modules share goes by the first of its names.

    Raises:
        ValueError: an expression of the config selects none.
    """
    places = {name: _place(name) for name, _ in model.named_parameters()}
    idle = [e for e in config.parameters if not any(re.search(e, place) for place in places.values())]
    if idle:
        raise ValueError(
            f"parameters={idle} is found in the name of no parameter of {type(model).__name__}.\n"
            f"  It has, for one, {next(reversed(places.values()), 'none')}. Leave the expression out, or mend it."
        )
    chosen = re.compile("|".join(f"(?:{expression})" for expression in config.parameters))
    return {name: parameter for name, parameter in model.named_parameters() if chosen.search(places[name])}


def _place(key: str) -> str:
    return key.removeprefix(_WRAPPED)

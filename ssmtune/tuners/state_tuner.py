"""The tuner that State-offset Tuning and Initial State Tuning share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ssmtune.mixers import state_shape
from ssmtune.tuners.mixer_tuner import MixerTunerModel
from ssmtune.tuners.state_config import StateTunerConfig


class StateTunerModel(MixerTunerModel):
    """Adds a `StateTunerLayer` to each targeted mixer; its adapters can be summed."""

    def _check_mixers(self, peft_config: StateTunerConfig, mixers: list[nn.Module]) -> None:
        rank, dstate = peft_config.rank or 1, min(state_shape(mixer)[-1] for mixer in mixers)
        if rank > dstate:
            raise ValueError(
                f"rank={rank} is more than the state size {dstate} of the mixers.\n"
                "  A product of that rank has more numbers than the matrix it stands for.\n"
                "  Leave rank out to train the matrix itself."
            )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is a weighted sum of others of this method; it is not active yet.

            new = sum_i weights[i] adapters[i]

        Args:
            adapters: the names of the adapters.
            weights: their weights, of either sign.
            adapter_name: the name of the new adapter.
            combination_type: "linear" gives whole matrices, whatever the adapters are. "cat" puts the factors of
                low-rank ones side by side: the same sum, of a rank that is the sum of theirs.

        Raises:
            ValueError: the names, weights or type do not fit, or the adapters cannot be summed.
        """
        configs = self._check_weighted(adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = replace(
            configs[0],
            rank=sum(config.rank for config in configs) if combination_type == "cat" else None,
            alpha=None,
            dropout=0.0,
            reparametrize=None,
            virtual_tokens=None,
            init_weights=True,
            **self._targets_of(adapters, configs),
            **self._combined_fields(adapters, configs),
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for _, layer in self._layers(self.model):
            if adapter_name in layer.available_adapters:
                layer.assign_sum(adapters, weights, adapter_name)

    def _check_weighted(self, adapters, weights, adapter_name, combination_type) -> list[StateTunerConfig]:
        own = self._own_configs()
        unknown = [name for name in adapters if name not in own]
        if unknown or not adapters:
            raise ValueError(
                f"cannot sum {list(adapters)}: {f'there is no adapter {unknown[0]!r}' if unknown else 'it is empty'}.\n"
                f"  Adapters of {type(self).__name__} here: {', '.join(own) or 'none'}."
            )
        if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"weights={list(weights)} do not fit {len(adapters)} adapters.\n"
                "  Pass one finite number per adapter, in the same order."
            )
        if adapter_name in self.peft_config:
            raise ValueError(
                f"the model already has an adapter named {adapter_name!r}.\n"
                "  Pass another adapter_name, or delete that adapter first."
            )
        configs = [own[name] for name in adapters]
        whole = [name for name, config in zip(adapters, configs, strict=True) if config.rank is None]
        if combination_type not in ("linear", "cat"):
            raise ValueError(
                f"combination_type={combination_type!r} is not known.\n"
                "  'linear' sums whole matrices, 'cat' puts the factors of low-rank ones side by side."
            )
        if combination_type == "cat" and whole:
            raise ValueError(
                f"combination_type='cat' needs adapters of a rank, which {whole[0]!r} has not.\n"
                "  Use 'linear', which sums whole matrices."
            )
        saved = [name for name, config in zip(adapters, configs, strict=True) if config.modules_to_save]
        if saved:
            raise ValueError(
                f"the adapter {saved[0]!r} has modules trained in full, which a weighted sum would not have.\n"
                "  Sum adapters without modules_to_save."
            )
        return configs

    def _targets_of(self, adapters: list[str], configs: list[StateTunerConfig]) -> dict[str, Any]:
        """The config fields that name the mixers that have any of the adapters."""
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        fields = {name: getattr(configs[0], name) for name in names}
        if all(getattr(config, name) == value for config in configs for name, value in fields.items()):
            return fields
        layers = self._layers(self.model)
        mixers = {name.rpartition(".")[0] for name, layer in layers if layer.available_adapters & set(adapters)}
        return dict.fromkeys(names) | {"target_modules": mixers}

    def _combined_fields(self, adapters: list[str], configs: list[StateTunerConfig]) -> dict[str, Any]:
        """What a method sets in the config of a weighted sum beside what both methods share."""
        return {}

    @classmethod
    @torch.no_grad()
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in cls._layers(model):
            for kind, mlp in layer.mlps(adapter_name).items():
                root = f"{name}.{cls.prefix}mlp.{adapter_name}.{kind}."
                parameters = {key: found.pop(root + key) for key, _ in mlp.named_parameters()}
                key = f"{name}.{cls.prefix}{kind}.{adapter_name}"
                found[key] = found[key] + functional_call(mlp, parameters)
            if adapter_name in layer.virtual_tokens:
                virtual = layer.virtual_tokens[adapter_name]
                for key, _ in virtual.named_parameters():
                    del found[f"{name}.{cls.prefix}virtual.{adapter_name}.{key}"]
                states = virtual().items()
                found |= {f"{name}.{cls.prefix}{kind}.{adapter_name}": s for kind, s in states if kind in layer.kinds}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in cls._layers(model):
            for kind, mlp in layer.mlps(adapter_name).items():
                # The tensor now holds what the MLP had given: it starts anew.
                mlp.restart()
                root = f"{name}.{cls.prefix}mlp.{adapter_name}.{kind}"
                found |= {f"{root}.{key}": parameter.detach() for key, parameter in mlp.named_parameters()}
        return found

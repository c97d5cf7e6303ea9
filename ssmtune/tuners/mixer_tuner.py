"""The tuner of every method that adds to the mixers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ssmtune.mixers import find_mixers, install_packing, patch_mixer, remove_packing, supports, unpatch_mixer
from ssmtune.tuners.adapter_file import check_tensors, naming
from ssmtune.tuners.adapters_of_rows import AdaptersOfRows
from ssmtune.tuners.mixer_config import MixerTunerConfig
from ssmtune.tuners.mixer_layer import MixerTunerLayer


class MixerTunerModel(AdaptersOfRows, BaseTuner):
    """Adds a `MixerTunerLayer` to each targeted mixer, and drives those mixers with ssmtune's operators."""

    tuner_layer_cls: type[MixerTunerLayer]
    # Name of the layer in the mixer. It must not contain `prefix`: transformers inserts the adapter's name behind the
    # first part of a key that does.
    child_name: str
    # What to do instead of merging.
    merge_remedy: str

    def __init__(self, model, peft_config, adapter_name, *args, **kwargs):
        own = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        known = getattr(model, "peft_config", {}).get(adapter_name)
        if known is not None and known.peft_type != own.peft_type:
            raise ValueError(
                f"the model already has an adapter named {adapter_name!r}, of the method {known.peft_type.value}.\n"
                "  Methods beside each other share one list of names. Pass another adapter_name."
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            # By now it may stand among those of another method of this model.
            if known is None:
                getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise
        self.peft_config = self.peft_config

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs of all methods of the model, which share one dict."""
        known = self.__dict__.get("_configs")
        if known is None:
            return self.model.peft_config
        if not hasattr(self.model, "peft_config"):
            # peft takes it away with the first method that is merged or unloaded.
            self._share_configs_of_those_left()
        return known

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        self._configs = configs

    def _own_configs(self) -> dict[str, MixerTunerConfig]:
        return {name: c for name, c in self.peft_config.items() if f"{c.peft_type.value.lower()}_" == self.prefix}

    def _share_configs_of_those_left(self) -> None:
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        left = {name for layer in layers for name in layer._all_available_adapter_names()}
        if left:
            for name in set(self._configs) - left:
                del self._configs[name]
            self.model.peft_config = self._configs

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ) -> None:
        _check_name(adapter_name)
        if state_dict is not None:
            # peft takes what a key says before the prefix for the module to adapt: here its child.
            state_dict = {key.replace(f".{self.child_name}.", "."): tensor for key, tensor in state_dict.items()}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        install_packing(model)

    def _prepare_adapter_config(self, peft_config: MixerTunerConfig, model_config: dict) -> MixerTunerConfig:
        if peft_config.target_modules is None:
            mixers = {name for name, _ in find_mixers(self.model)}
            short = {name.rpartition(".")[2] for name in mixers}
            # Nemotron-H calls attention and dense layers mixers too.
            others = {name.rpartition(".")[2] for name, _ in self.model.named_modules() if name not in mixers}
            peft_config.target_modules = mixers if short & others else short
        return peft_config

    def _prepare_model(self, peft_config: MixerTunerConfig, model: nn.Module) -> None:
        mixers = [name for name, _ in find_mixers(model)]
        if not mixers:
            kinds = sorted({type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch.")})
            raise ValueError(
                f"{type(model).__name__} has no mixer that {type(peft_config).__name__} can adapt.\n"
                f"  Its modules are of the types {', '.join(kinds)}.\n"
                "  Use a Mamba model, or another peft method."
            )
        offer = f"Mixers in this model: {_span(mixers)}. Leave target_modules unset to adapt all."
        wanted = _as_list(peft_config.target_modules)
        modules = dict(model.named_modules())
        matched = [name for name in modules if name and self._check_target_module_exists(peft_config, name)]
        for name in matched:
            if not supports(modules[name]):
                raise ValueError(
                    f"target_modules={wanted} matched {name}, a {type(modules[name]).__name__}, which has no state.\n"
                    f"  {offer}"
                )
        if not matched:
            raise ValueError(f"no module of {type(model).__name__} matched target_modules={wanted}.\n  {offer}")
        self._check_mixers(peft_config, [modules[name] for name in matched])
        if isinstance(peft_config.target_modules, str):
            return
        idle = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in modules)]
        if idle:
            raise ValueError(f"no module of {type(model).__name__} matched {idle} of target_modules.\n  {offer}")
        indices = {int(part) for name in matched for part in name.split(".") if part.isdigit()}
        beyond = [index for index in _as_list(peft_config.layers_to_transform) if index not in indices]
        if beyond:
            raise ValueError(
                f"layers_to_transform={beyond} matched no mixer.\n  Mixers in this model: {_span(mixers)}."
            )

    def _check_mixers(self, peft_config: MixerTunerConfig, mixers: list[nn.Module]) -> None:
        """Raise a ValueError if a config does not fit the mixers that it is for."""

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer = target._modules.get(self.child_name)
        if layer is None:
            # Before the layer is made: a patched mixer has the names of sizes that layers read.
            patched = patch_mixer(target)
            layer = self.tuner_layer_cls(target).train(target.training)
            layer.unpatch_on_removal = patched
            target.add_module(self.child_name, layer)
        layer.update_layer(adapter_name, peft_config, target.conv1d.weight.device)

    @torch.no_grad()
    def add_stored(
        self, like: str, adapters: Iterable[tuple[str, MixerTunerConfig, Mapping[str, torch.Tensor]]]
    ) -> None:
        """Add adapters that have tensors where another one has, frozen, as they were stored.

        It looks for the layers once. peft goes over all modules and all tensors of the model for each adapter that it
        loads, which takes the longer the more there are.

        Args:
            like: an adapter of this method that the model has.
            adapters: name, config and stored tensors of each one to be added.

        Raises:
            ValueError: a name cannot be one, or tensors do not fit or are not finite; adapters before stay added.
        """
        layers = [(name, layer) for name, layer in self._layers(self.model) if like in layer.available_adapters]
        expected = self.stored_tensors(self.model, like)
        for name, config, stored in adapters:
            found = {f"{key.removeprefix('base_model.model.')}.{like}": tensor for key, tensor in stored.items()}
            with naming(name):
                _check_name(name)
                check_tensors(expected, found, self.prefix, config.base_model_name_or_path)
            for place, layer in layers:
                kinds = [kind for kind in layer.tensor_names if like in getattr(layer, kind)]
                layer.add_like(like, name, {kind: found[f"{place}.{kind}.{like}"] for kind in kinds})
            config.inference_mode = True
            self.peft_config[name] = config

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot merge its adapter: no weight of the model has the same effect.\n"
            f"  {self.merge_remedy}"
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_merge_allowed()
        self.remove_layers(self.model)
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        # Other methods stay: peft would take them out as well.
        own = self._own_configs()
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                active = [name for name in module.active_adapters if name not in own]
                for name in own:
                    module.delete_adapter(name, new_active_adapters=active)
        for name in own:
            del self.peft_config[name]
        return self.model

    @classmethod
    def remove_layers(cls, model: nn.Module, unused_only: bool = False) -> None:
        """Take the layers of this method out of a model, or only the empty ones; mixers become what they were."""
        for mixer in list(model.modules()):
            layer = mixer._modules.get(cls.child_name)
            if not isinstance(layer, cls.tuner_layer_cls) or (unused_only and layer.available_adapters):
                continue
            delattr(mixer, cls.child_name)
            if layer.unpatch_on_removal:
                others = [child for child in mixer.children() if isinstance(child, MixerTunerLayer)]
                if others:
                    others[0].unpatch_on_removal = True
                else:
                    unpatch_mixer(mixer)
        remove_packing(model)

    @classmethod
    def _layers(cls, model: nn.Module) -> list[tuple[str, MixerTunerLayer]]:
        return [(name, module) for name, module in model.named_modules() if isinstance(module, cls.tuner_layer_cls)]

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(cls.stored_tensors(model, adapter_name), found, cls.prefix, config.base_model_name_or_path)
        for name, layer in cls._layers(model):
            device = model.get_submodule(name.rpartition(".")[0]).conv1d.weight.device
            for key in cls.stored_tensors(layer, adapter_name):
                # With low_cpu_mem_usage peft puts these very tensors into the model, so they need its dtype and device.
                tensor = found[f"{name}.{key}"]
                tensor = tensor.to(dtype=torch.float32) if tensor.is_floating_point() else tensor
                found[f"{name}.{key}"] = tensor if device.type == "meta" else tensor.to(device)
        return found

    @classmethod
    def stored_tensors(cls, model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of an adapter that are stored, by their names in the model."""
        return {
            ".".join(filter(None, (name, kind, adapter_name))): getattr(layer, kind)[adapter_name]
            for name, layer in cls._layers(model)
            for kind in (*layer.tensor_names, *layer.index_names)
            if adapter_name in getattr(layer, kind)
        }


def _check_name(adapter_name: str) -> None:
    # Its parameters are attributes of this name, beside those that torch gives a dict of parameters.
    if "." in adapter_name or not adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(
            f"{adapter_name!r} cannot be the name of an adapter: torch has no parameter of such a name.\n"
            "  Pass another adapter_name, without dots."
        )


def _as_list(value) -> list:
    if value is None:
        return []
    return sorted(value) if isinstance(value, (list, set, tuple)) else [value]


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

"""What State-offset Tuning and Initial State Tuning share: the config fields, the layer and the tuner.

The layer is a child module of the mixer, which stays where it is. Wrapping the mixer instead would hide its
projections from LoRA and every other peft method added later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ssmtune.mixers import StateAdapter, find_mixers, patch_mixer, supports, unpatch_mixer
from ssmtune.tuners.adapter_file import check_readable, check_tensors

IMPORT_NOTE = "Import `ssmtune` before loading this adapter: it adds the method to peft."


@dataclass
class StateTunerConfig(PeftConfig):
    """Fields of both methods; see `StateOffsetConfig` and `InitialStateConfig`."""

    rank: int | None = field(
        default=None,
        metadata={"help": "None trains the whole (dim, dstate) matrix; r trains it as B A, B (dim, r), A (r, dstate)."},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Scales the low-rank product by alpha / rank. None leaves it unscaled."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at zero, so that the model equals its base. False draws noise, for tests only."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the mixers to adapt, or one regular expression. None adapts every mixer."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of mixers to leave alone, or one regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt, counted from 0. None adapts every layer."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that layers_to_transform counts in, where it is not the first one."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and store with the adapter."}
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(
                f"rank must be None or an integer of at least 1, got {self.rank!r}.\n"
                "  Leave it out to train the whole (dim, dstate) matrix."
            )
        if self.alpha is not None and self.rank is None:
            raise ValueError(
                f"alpha={self.alpha!r} was given without a rank: it scales the low-rank product by alpha / rank.\n"
                "  Set rank, or leave alpha out and choose the learning rate instead."
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha must be a positive number, got {self.alpha!r}.\n"
                "  It scales the low-rank product by alpha / rank. Leave it out for no scaling."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform cannot be used with target_modules as a regular expression.\n"
                "  Put the layers into the expression, or give target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} was given without layers_to_transform.\n"
                "  It only says where those indices count. Set layers_to_transform, or leave it out."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        check_readable(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file() and IMPORT_NOTE not in (text := card.read_text(encoding="utf-8")):
            card.write_text(f"{text.rstrip()}\n\n{IMPORT_NOTE}\n", encoding="utf-8")


class StateTunerLayer(StateAdapter, BaseTunerLayer):
    """The adapter tensors of one mixer, for every adapter of one method.

    Each kind of tensor has a `nn.ParameterDict` keyed by adapter name, whose own name begins with the method's prefix:
    peft and transformers find the tensors by it. The tensors are float32 whatever the model is cast to, since updates
    the size of a learning rate of 1e-4 vanish in bfloat16.

    Args:
        mixer: the mixer the layer becomes a child of.
    """

    prefix: str
    # peft reads both from the layer that an adapter wraps. Here there is none.
    weight = None
    bias = None
    other_param_names = ("scaling",)

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.dim, self.dstate = mixer.A_log.shape
        self.scaling: dict[str, float] = {}
        self.unpatch_on_removal = False
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def shapes(self, config: StateTunerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an adapter, by the name of its dict."""
        if config.rank is None:
            return {f"{self.prefix}h": (self.dim, self.dstate)}
        return {f"{self.prefix}A": (config.rank, self.dstate), f"{self.prefix}B": (self.dim, config.rank)}

    def update_layer(self, adapter_name: str, config: StateTunerConfig, device: torch.device) -> None:
        """Add the tensors of one adapter, in place of those it may have."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (known := getattr(self, name)):
                del known[adapter_name]
        for name, shape in self.shapes(config).items():
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            if name == f"{self.prefix}A":
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            elif not config.init_weights:
                nn.init.normal_(tensor, std=0.1)
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        if config.rank is not None:
            self.scaling[adapter_name] = 1.0 if config.alpha is None else config.alpha / config.rank

    def matrix(self, adapter_name: str) -> torch.Tensor | None:
        """Return the (dim, dstate) matrix of one adapter, or None if it has none here."""
        dense, low_rank = self._tensors("h"), self._tensors("B")
        if adapter_name in dense:
            return dense[adapter_name]
        if adapter_name not in low_rank:
            return None
        B, A = low_rank[adapter_name], self._tensors("A")[adapter_name]
        # Not a matrix product, which autocast would round to bfloat16.
        return (B.unsqueeze(2) * A).sum(1) * self.scaling[adapter_name]

    def active_sum(self, read: Callable[[str], torch.Tensor | None]) -> torch.Tensor | None:
        """Return the sum of `read(name)` over the active adapters that have it, or None."""
        if self.disable_adapters:
            return None
        values = [value for name in self.active_adapters if (value := read(name)) is not None]
        return sum(values[1:], start=values[0]) if values else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there is no weight to merge into, and the adapter stays active.

        peft calls this on every adapter of a model when it merges one method, such as a LoRA beside this one. Merging
        this method itself is refused by the tuner.
        """

    unmerge = merge

    def _tensors(self, kind: str) -> nn.ParameterDict:
        return getattr(self, f"{self.prefix}{kind}")

    def _apply(self, fn, recurse=True):
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move_only, recurse)


class StateTunerModel(BaseTuner):
    """Adds a `StateTunerLayer` to each targeted mixer, and drives those mixers with ssmtune's operators."""

    tuner_layer_cls: type[StateTunerLayer]
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
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: StateTunerConfig, model_config: dict) -> StateTunerConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = {name.rpartition(".")[2] for name, _ in find_mixers(self.model)}
        return peft_config

    def _prepare_model(self, peft_config: StateTunerConfig, model: nn.Module) -> None:
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
        rank, dstate = peft_config.rank or 1, min(modules[name].A_log.shape[1] for name in matched)
        if rank > dstate:
            raise ValueError(
                f"rank={rank} is more than the state size {dstate} of the mixers.\n"
                "  A product of that rank has more numbers than the matrix it stands for.\n"
                "  Leave rank out to train the matrix itself."
            )
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

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer = target._modules.get(self.child_name)
        if layer is None:
            layer = self.tuner_layer_cls(target)
            layer.unpatch_on_removal = patch_mixer(target)
            target.add_module(self.child_name, layer)
        layer.update_layer(adapter_name, peft_config, target.A_log.device)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{type(self).__name__} cannot run one batch with several adapters, as adapter_names asks for.\n"
                "  Run one batch per adapter, with set_adapter before each."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot merge its adapter: no weight of the model has the same effect.\n"
            f"  {self.merge_remedy}"
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_merge_allowed()
        for mixer in list(self.model.modules()):
            layer = mixer._modules.get(self.child_name)
            if not isinstance(layer, self.tuner_layer_cls):
                continue
            delattr(mixer, self.child_name)
            if layer.unpatch_on_removal:
                others = [child for child in mixer.children() if isinstance(child, StateTunerLayer)]
                if others:
                    others[0].unpatch_on_removal = True
                else:
                    unpatch_mixer(mixer)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            f"{name}.{kind}.{adapter_name}": tensors[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, cls.tuner_layer_cls)
            for kind in layer.adapter_layer_names
            if adapter_name in (tensors := getattr(layer, kind))
        }
        check_tensors(expected, found, cls.prefix, config.base_model_name_or_path)
        for key in expected:
            # With low_cpu_mem_usage peft puts these very tensors into the model, so they need its dtype and device.
            mixer = model.get_submodule(key.rsplit(".", 3)[0])
            found[key] = found[key].to(dtype=torch.float32)
            if mixer.A_log.device.type != "meta":
                found[key] = found[key].to(mixer.A_log.device)
        return found


def _as_list(value) -> list:
    if value is None:
        return []
    return sorted(value) if isinstance(value, (list, set, tuple)) else [value]


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"

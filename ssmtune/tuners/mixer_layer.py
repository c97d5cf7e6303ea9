"""The layer of every method that adds to a mixer.

It is a child module of the mixer, which stays where it is. Wrapping the mixer instead would hide its projections from
LoRA and every other peft method added later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ssmtune.mixers import StateAdapter, state_shape
from ssmtune.tuners.mixer_config import MixerTunerConfig


class MixerTunerLayer(StateAdapter, BaseTunerLayer):
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

    def __init__(self, mixer: nn.Module):
        super().__init__()
        *channels, self.dstate = state_shape(mixer)
        self.dim = math.prod(channels)
        # In a tuple, so that the mixer does not become a child of its own.
        self.mixer = (mixer,)
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.unpatch_on_removal = False
        self.assign_rows(None)
        for name in self.tensor_names:
            setattr(self, name, nn.ParameterDict())

    @property
    def tensor_names(self) -> list[str]:
        """The names of the dicts that hold tensors, in the order of `adapter_layer_names`."""
        return list(self.adapter_layer_names)

    @property
    def index_names(self) -> list[str]:
        """The names of the dicts of integers that are stored with the tensors."""
        return []

    @property
    def available_adapters(self) -> set[str]:
        """The names of the adapters that this mixer has."""
        return {adapter for name in self.tensor_names for adapter in getattr(self, name)}

    def shapes(self, config: MixerTunerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of an adapter, by the name of its dict."""
        raise NotImplementedError

    def start(self, name: str, tensor: torch.Tensor, config: MixerTunerConfig) -> None:
        """Fill a tensor of zeros with what training starts from."""
        if not config.init_weights:
            nn.init.normal_(tensor, std=0.1)

    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: MixerTunerConfig, device: torch.device) -> None:
        """Add the tensors of one adapter, in place of those it may have."""
        for name in (*self.adapter_layer_names, *self.other_param_names, "frozen_peft_weight_names"):
            if adapter_name in (known := getattr(self, name)):
                del known[adapter_name]
        for name, shape in self.shapes(config).items():
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            self.start(name, tensor, config)
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)

    def add_like(self, like: str, adapter_name: str, stored: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter, frozen, set as another one but with copies of these tensors, by the names of their dicts."""
        for name, tensor in stored.items():
            known = getattr(self, name)
            tensor = tensor.to(known[like].device, torch.float32, copy=True)
            known[adapter_name] = nn.Parameter(tensor, requires_grad=False)
        for name in self.other_param_names:
            if like in (known := getattr(self, name)):
                known[adapter_name] = known[like]

    def tensors(self, kind: str) -> nn.ParameterDict | nn.ModuleDict:
        """Return the dict of one kind of tensor, "h", "A" or the like, by adapter name."""
        return getattr(self, f"{self.prefix}{kind}")

    @property
    def active_here(self) -> list[str]:
        """The names of the adapters of this mixer that act now; none while they are switched off."""
        return [] if self.disable_adapters else [n for n in self.active_adapters if n in self.available_adapters]

    def assign_rows(self, adapters: list[str] | None) -> None:
        """Give each row of the batches to come an adapter of its own, until None makes the active ones serve all."""
        self.row_adapters = adapters

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there is no weight to merge into, and the adapter stays active.

        peft calls this on every adapter of a model when it merges one method, such as a LoRA beside this one. Merging
        this method itself is refused by the tuner.
        """

    unmerge = merge

    def _apply(self, fn, recurse=True):
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move_only, recurse)


@contextmanager
def as_base(model: nn.Module, layers: Sequence[MixerTunerLayer]) -> Iterator[None]:
    """Switch these layers and everything that acts in training only off, for the time of the body."""
    modes = {module: module.training for module in model.modules()}
    disabled = [layer.disable_adapters for layer in layers]
    model.eval()
    for layer in layers:
        # Not by enable_adapters, which also says what requires gradients.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, disabled, strict=True):
            layer._disable_adapters = was
        for module, training in modes.items():
            module.training = training

"""The layer that State-offset Tuning and Initial State Tuning share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.mixers import StateInputs
from ssmtune.tuners.mixer_layer import MixerTunerLayer
from ssmtune.tuners.reparametrization import Reparametrization
from ssmtune.tuners.state_config import StateTunerConfig
from ssmtune.tuners.virtual_tokens import VirtualTokens


class StateTunerLayer(MixerTunerLayer):
    """States and outputs that are added to those of one mixer, whole, of a rank or through an MLP.

    An adapter with `reparametrize` keeps its tensors where they are, frozen, and trains MLPs whose results are added.
    One with `virtual_tokens` has no tensors, but virtual tokens that give the state.

    Args:
        mixer: the mixer the layer becomes a child of.
    """

    # What `value` can be asked for, and the field of `StateInputs` it goes to.
    kinds: dict[str, str]
    other_param_names = ("scaling", "dropout")

    def __init__(self, mixer: nn.Module):
        super().__init__(mixer)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        setattr(self, f"{self.prefix}mlp", nn.ModuleDict())
        setattr(self, f"{self.prefix}virtual", nn.ModuleDict())

    @property
    def tensor_names(self) -> list[str]:
        modules = (f"{self.prefix}mlp", f"{self.prefix}virtual")
        return [name for name in super().tensor_names if name not in modules]

    @property
    def virtual_tokens(self) -> nn.ModuleDict:
        """The `VirtualTokens` by the names of the adapters that have such."""
        return self.tensors("virtual")

    @property
    def available_adapters(self) -> set[str]:
        return super().available_adapters | set(self.virtual_tokens)

    def shapes(self, config: StateTunerConfig) -> dict[str, tuple[int, ...]]:
        if config.virtual_tokens is not None:
            return {}
        if config.rank is None:
            return {f"{self.prefix}h": (self.dim, self.dstate)}
        return {f"{self.prefix}A": (config.rank, self.dstate), f"{self.prefix}B": (self.dim, config.rank)}

    def start(self, name: str, tensor: torch.Tensor, config: StateTunerConfig) -> None:
        if name == f"{self.prefix}A":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            super().start(name, tensor, config)

    def update_layer(self, adapter_name: str, config: StateTunerConfig, device: torch.device) -> None:
        super().update_layer(adapter_name, config, device)
        if config.rank is not None:
            self.scaling[adapter_name] = 1.0 if config.alpha is None else config.alpha / config.rank
            self.dropout[adapter_name] = config.dropout
        if config.virtual_tokens is not None:
            virtual = VirtualTokens(self.mixer[0], config.virtual_tokens, config.reparametrize, device)
            self.virtual_tokens[adapter_name] = virtual
        elif config.reparametrize is not None:
            shapes = self.shapes(config)
            self.tensors("mlp")[adapter_name] = nn.ModuleDict(
                {
                    name.removeprefix(self.prefix): Reparametrization(shape, config.reparametrize, device)
                    for name, shape in shapes.items()
                }
            )
            self.frozen_peft_weight_names[adapter_name] = tuple(shapes)

    def mlps(self, adapter_name: str) -> dict[str, Reparametrization]:
        """Return the MLPs of one adapter by the kind of tensor they add to; none without `reparametrize`."""
        known = self.tensors("mlp")
        return dict(known[adapter_name].items()) if adapter_name in known else {}

    def value(self, kind: str, adapter_name: str, training: bool = False) -> torch.Tensor | None:
        """Return what one adapter adds, or None if it adds nothing of this kind here.

        Args:
            kind: "h" for the (dim, dstate) matrix, whole or of a rank, or the name of another tensor.
            adapter_name: the adapter.
            training: whether dropout applies.
        """
        if adapter_name in self.virtual_tokens:
            return self.virtual_tokens[adapter_name]().get(kind)
        dense = self.tensors(kind)
        if adapter_name in dense:
            mlps = self.mlps(adapter_name)
            return dense[adapter_name] + mlps[kind]() if kind in mlps else dense[adapter_name]
        if kind != "h" or adapter_name not in self.tensors("B"):
            return None
        B, A = self.tensors("B")[adapter_name], self.tensors("A")[adapter_name]
        if training and self.dropout[adapter_name]:
            # Whole terms B[:, r] A[r] at a time: an entry of A alone is an entry of the state for every channel.
            A = A * F.dropout(A.new_ones(A.shape[0], 1), self.dropout[adapter_name])
        # Not a matrix product, which autocast would round to bfloat16.
        return (B.unsqueeze(2) * A).sum(1) * self.scaling[adapter_name]

    @torch.no_grad()
    def assign(self, kind: str, adapter_name: str, value: torch.Tensor) -> None:
        """Make an adapter add a given tensor; one of a rank gets the nearest to it that has this rank.

        Raises:
            ValueError: the adapter has virtual tokens.
        """
        if adapter_name in self.virtual_tokens:
            raise ValueError(
                f"the adapter {adapter_name!r} cannot be given a state: its state is what its virtual tokens leave.\n"
                "  Save and load it, which folds them into a state, or use an adapter without virtual_tokens."
            )
        dense = self.tensors(kind)
        if adapter_name in dense:
            dense[adapter_name].copy_(value)
            if kind in (mlps := self.mlps(adapter_name)):
                mlps[kind].restart()
            return
        B, A = self.tensors("B")[adapter_name], self.tensors("A")[adapter_name]
        U, S, Vh = torch.linalg.svd(value.to(B) / self.scaling[adapter_name], full_matrices=False)
        root, rank = S.sqrt(), A.shape[0]
        B.copy_((U * root)[:, :rank])
        A.copy_((root.unsqueeze(1) * Vh)[:rank])

    @torch.no_grad()
    def assign_sum(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Make an adapter add the weighted sum of others; its tensors are whole, or have the ranks of all of them."""
        if adapter_name in self.tensors("B"):
            A, B, at = self.tensors("A")[adapter_name], self.tensors("B")[adapter_name], 0
            for name, weight in zip(adapters, weights, strict=True):
                if name in self.tensors("B"):
                    rank = self.tensors("A")[name].shape[0]
                    A[at : at + rank] = self.tensors("A")[name]
                    B[:, at : at + rank] = weight * self.scaling[name] * self.tensors("B")[name]
                    at += rank
        for kind in self.kinds:
            values = [self.value(kind, name) for name in adapters]
            terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
            if terms and adapter_name in self.tensors(kind):
                self.assign(kind, adapter_name, sum(terms[1:], start=terms[0]))

    def assign_rows(self, adapters: list[str] | None) -> None:
        super().assign_rows(adapters)
        self._stacked: StateInputs | None = None

    def state_inputs(self) -> StateInputs:
        if self.disable_adapters:
            return StateInputs()
        if self.row_adapters is None:
            return StateInputs(**{field: self.active_sum(kind) for kind, field in self.kinds.items()})
        # Kept while the rows are: generation would stack the same adapters again at every token.
        if self._stacked is None:
            self._stacked = self._stack(self.row_adapters)
        return self._stacked

    def active_sum(self, kind: str) -> torch.Tensor | None:
        """Return the sum of what the active adapters add, or None if none adds anything of this kind."""
        values = [self.value(kind, name, self.training) for name in self.active_adapters]
        values = [value for value in values if value is not None]
        return sum(values[1:], start=values[0]) if values else None

    def _stack(self, row_adapters: list[str]) -> StateInputs:
        # In the order of the rows: where each has an adapter of its own the stack is what they have, as it is.
        available = self.available_adapters
        adapters = [name for name in dict.fromkeys(row_adapters) if name in available]
        stacks = {}
        for kind, field in self.kinds.items():
            values = [self.value(kind, name, self.training) for name in adapters]
            known = next((value for value in values if value is not None), None)
            if known is not None:
                values = [torch.zeros_like(known) if value is None else value for value in values]
                stacks[field] = torch.stack(values)
        if not stacks:
            return StateInputs()
        place = {name: index for index, name in enumerate(adapters)}
        index = [place.get(name, -1) for name in row_adapters]
        return StateInputs(**stacks, adapter_index=torch.tensor(index, device=next(iter(stacks.values())).device))

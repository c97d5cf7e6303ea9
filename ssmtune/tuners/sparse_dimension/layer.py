from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ssmtune.tuners.mixer_layer import MixerTunerLayer
from ssmtune.tuners.sparse_dimension.config import SparseDimensionConfig


class SparseDimensionLayer(MixerTunerLayer):
    """The changes of one mixer: "A" (channels, states), "B" and "C" (dstate, channels), and which these are.

    "channels" (channels,) and "states" (channels, states) are integers. Until they are chosen they are the first ones.
    """

    prefix = "sparse_dimension_"
    adapter_layer_names = ("sparse_dimension_A", "sparse_dimension_B", "sparse_dimension_C")
    other_param_names = ("sparse_dimension_channels", "sparse_dimension_states", "pending")

    def __init__(self, mixer: nn.Module):
        super().__init__(mixer)
        for name in self.index_names:
            setattr(self, name, BufferDict({}, persistent=True))
        # The configs of adapters whose dimensions are still to be chosen, by name.
        self.pending: dict[str, SparseDimensionConfig] = {}

    @property
    def index_names(self) -> list[str]:
        return ["sparse_dimension_channels", "sparse_dimension_states"]

    def sizes(self, config: SparseDimensionConfig) -> tuple[int, int]:
        """How many channels, and states of each, a config trains."""
        return max(1, round(config.channels * self.dim)), max(1, round(config.states * self.dstate))

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        channels, states = self.sizes(config)
        projection = (self.dstate, channels)
        return dict(zip(self.adapter_layer_names, ((channels, states), projection, projection), strict=True))

    def update_layer(self, adapter_name, config, device) -> None:
        super().update_layer(adapter_name, config, device)
        channels, states = self.sizes(config)
        self.tensors("channels")[adapter_name] = torch.arange(channels, device=device)
        self.tensors("states")[adapter_name] = torch.arange(states, device=device).repeat(channels, 1)
        self.pending[adapter_name] = config

    def train_dimensions(self, adapter_name: str, channels: Tensor, states: Tensor) -> None:
        """Train other channels (channels,) and states (channels, states) of them, from the base."""
        self.tensors("channels")[adapter_name], self.tensors("states")[adapter_name] = channels, states
        projection = (self.dstate, len(channels))
        for name, shape in zip("ABC", (states.shape, projection, projection), strict=True):
            known = self.tensors(name)
            known[adapter_name] = nn.Parameter(known[adapter_name].new_zeros(shape))

    def matrix_change(self, adapter_name: str) -> Tensor:
        """What is added to log(-A), (dim, dstate)."""
        values = self.tensors("A")[adapter_name]
        channels = self.tensors("channels")[adapter_name].unsqueeze(1)
        dense = values.new_zeros(self.dim, self.dstate)
        return dense.index_put((channels, self.tensors("states")[adapter_name]), values)

    def change_matrix(self, A):
        for name in self.active_here:
            A = A * torch.exp(self.matrix_change(name))
        return A

    def change_projections(self, u, B, C):
        for name in self.active_here:
            chosen = u[..., self.tensors("channels")[name]]
            B = B + F.linear(chosen, self.tensors("B")[name].to(u.dtype))
            C = C + F.linear(chosen, self.tensors("C")[name].to(u.dtype))
        return B, C

    @torch.no_grad()
    def merge_into_mixer(self) -> None:
        """Add the active adapters to the weights of the mixer."""
        (mixer,) = self.mixer
        weight, dstate = mixer.x_proj.weight, self.dstate
        for name in self.active_here:
            mixer.A_log.add_(self.matrix_change(name).view_as(mixer.A_log))
            channels = self.tensors("channels")[name]
            for kind, rows in (("B", slice(-2 * dstate, -dstate)), ("C", slice(-dstate, None))):
                weight[rows, channels] += self.tensors(kind)[name].to(weight.dtype)

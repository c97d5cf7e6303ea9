from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.mixers import ExtraStates
from ssmtune.tuners.mixer_layer import MixerTunerLayer


class AdditionalScanLayer(MixerTunerLayer):
    """The log of -A' (dim, states) of one mixer, and its W_B and W_C (states, dim)."""

    prefix = "additional_scan_"
    adapter_layer_names = ("additional_scan_A_log", "additional_scan_B", "additional_scan_C")

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        projection = (config.states, self.dim)
        return dict(zip(self.adapter_layer_names, ((self.dim, config.states), projection, projection), strict=True))

    def start(self, name, tensor, config) -> None:
        super().start(name, tensor, config)
        if name == "additional_scan_A_log":
            (mixer,) = self.mixer
            tensor.add_(mixer.A_log.flatten(0, -2)[:, :1])
        elif name == "additional_scan_B":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def extra_states(self, u) -> ExtraStates | None:
        adapters = self.active_here
        if self.row_adapters is not None and not self.disable_adapters:
            adapters = sorted(self.available_adapters.intersection(self.row_adapters))
        if not adapters:
            return None
        A_log = torch.cat([self.tensors("A_log")[name] for name in adapters], dim=1)
        B, C = (torch.cat([self.tensors(kind)[name] for name in adapters]).to(u.dtype) for kind in "BC")
        B, C = F.linear(u, B), F.linear(u, C)
        if self.row_adapters is not None:
            # Every row has the states of all adapters, and reads its own.
            sizes = [self.tensors("C")[name].shape[0] for name in adapters]
            owners = [name for name, size in zip(adapters, sizes, strict=True) for _ in range(size)]
            read = [[owner == name for owner in owners] for name in self.row_adapters]
            C = C * torch.tensor(read, device=C.device, dtype=C.dtype).unsqueeze(1)
        return ExtraStates(-torch.exp(A_log), B, C)

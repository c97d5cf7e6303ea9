from __future__ import annotations

import torch
from torch import nn

from ssmtune.tuners.initial_state.config import InitialStateConfig
from ssmtune.tuners.state_layer import StateTunerLayer


class InitialStateLayer(StateTunerLayer):
    """The initial states "h" (dim, dstate) of one mixer, and those of its convolution "conv" (channels, width - 1)."""

    prefix = "initial_state_"
    kinds = {"h": "initial_state", "conv": "conv_state"}
    adapter_layer_names = (
        "initial_state_h",
        "initial_state_conv",
        "initial_state_A",
        "initial_state_B",
        "initial_state_mlp",
        "initial_state_virtual",
    )

    other_param_names = (*StateTunerLayer.other_param_names, "inference_scale")

    def __init__(self, mixer: nn.Module):
        super().__init__(mixer)
        self.inference_scale: dict[str, float] = {}
        self.conv_shape = mixer.conv1d.weight.shape[0], mixer.conv_kernel_size - 1

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(config)
        if config.conv_state and config.virtual_tokens is None:
            shapes["initial_state_conv"] = self.conv_shape
        return shapes

    def update_layer(self, adapter_name: str, config: InitialStateConfig, device: torch.device) -> None:
        super().update_layer(adapter_name, config, device)
        self.inference_scale[adapter_name] = config.inference_scale

    def value(self, kind: str, adapter_name: str, training: bool = False) -> torch.Tensor | None:
        value = super().value(kind, adapter_name, training)
        scale = self.inference_scale.get(adapter_name, 1.0)
        return value if value is None or training or kind != "h" or scale == 1 else value * scale

    def assign(self, kind: str, adapter_name: str, value: torch.Tensor) -> None:
        super().assign(kind, adapter_name, value / self.inference_scale[adapter_name] if kind == "h" else value)

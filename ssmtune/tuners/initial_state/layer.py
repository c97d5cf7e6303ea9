from __future__ import annotations

from torch import nn

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

    def __init__(self, mixer: nn.Module):
        super().__init__(mixer)
        self.conv_shape = mixer.conv1d.weight.shape[0], mixer.conv_kernel_size - 1

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(config)
        if config.conv_state and config.virtual_tokens is None:
            shapes["initial_state_conv"] = self.conv_shape
        return shapes

from __future__ import annotations

import torch
from torch import nn

from ssmtune.tuners.initial_state.prefix import Prefix
from ssmtune.tuners.state_layer import StateTunerLayer


class InitialStateLayer(StateTunerLayer):
    """The initial states "h" (dim, dstate) of one mixer, and those of its convolution "conv" (dim, width - 1).

    An adapter with `virtual_tokens` has neither, but the virtual tokens that give both.
    """

    prefix = "initial_state_"
    kinds = {"h": "initial_state", "conv": "conv_state"}
    adapter_layer_names = (
        "initial_state_h",
        "initial_state_conv",
        "initial_state_A",
        "initial_state_B",
        "initial_state_mlp",
        "initial_state_prefix",
    )

    def __init__(self, mixer: nn.Module):
        super().__init__(mixer)
        self.conv_width = mixer.conv_kernel_size
        # In a tuple, so that the mixer does not become a child of its own.
        self.mixer = (mixer,)
        self.initial_state_prefix = nn.ModuleDict()

    @property
    def tensor_names(self) -> list[str]:
        return [name for name in super().tensor_names if name != "initial_state_prefix"]

    @property
    def available_adapters(self) -> set[str]:
        return super().available_adapters | set(self.initial_state_prefix)

    def update_layer(self, adapter_name, config, device) -> None:
        super().update_layer(adapter_name, config, device)
        if config.virtual_tokens is not None:
            prefix = Prefix(self.mixer[0], config.virtual_tokens, config.reparametrize, device)
            self.initial_state_prefix[adapter_name] = prefix

    def value(self, kind, adapter_name, training=False) -> torch.Tensor | None:
        if adapter_name in self.initial_state_prefix:
            return self.initial_state_prefix[adapter_name]()[kind]
        return super().value(kind, adapter_name, training)

    def assign(self, kind, adapter_name, value) -> None:
        if adapter_name in self.initial_state_prefix:
            raise ValueError(
                f"the adapter {adapter_name!r} cannot be given a state: its state is what its virtual tokens leave.\n"
                "  Save and load it, which folds them into a state, or use an adapter without virtual_tokens."
            )
        super().assign(kind, adapter_name, value)

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        if config.virtual_tokens is not None:
            return {}
        shapes = super().shapes(config)
        return shapes | ({"initial_state_conv": (self.dim, self.conv_width - 1)} if config.conv_state else {})

from __future__ import annotations

import torch

from ssmtune.mixers import StateInputs
from ssmtune.tuners.state_tuner import StateTunerLayer


class StateOffsetLayer(StateTunerLayer):
    """The state offsets (dim, dstate) and output offsets (dim,) of one mixer."""

    prefix = "state_offset_"
    adapter_layer_names = ("state_offset_h", "state_offset_y", "state_offset_A", "state_offset_B")

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        return super().shapes(config) if config.target == "h" else {"state_offset_y": (self.dim,)}

    def vector(self, adapter_name: str) -> torch.Tensor | None:
        """Return the (dim,) output offset of one adapter, or None if it has none here."""
        return self.state_offset_y[adapter_name] if adapter_name in self.state_offset_y else None

    def state_inputs(self) -> StateInputs:
        return StateInputs(state_offset=self.active_sum(self.matrix), output_offset=self.active_sum(self.vector))

from __future__ import annotations

from ssmtune.tuners.state_layer import StateTunerLayer


class StateOffsetLayer(StateTunerLayer):
    """The state offsets "h" (dim, dstate) and output offsets "y" (dim,) of one mixer."""

    prefix = "state_offset_"
    kinds = {"h": "state_offset", "y": "output_offset"}
    adapter_layer_names = (
        "state_offset_h",
        "state_offset_y",
        "state_offset_A",
        "state_offset_B",
        "state_offset_mlp",
        "state_offset_virtual",
    )

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        return super().shapes(config) if config.target == "h" else {"state_offset_y": (self.dim,)}

from __future__ import annotations

from ssmtune.tuners.state_offset.layer import StateOffsetLayer
from ssmtune.tuners.state_tuner import StateTunerModel


class StateOffsetModel(StateTunerModel):
    """The tuner of State-offset Tuning; see `StateOffsetConfig`."""

    prefix = StateOffsetLayer.prefix
    tuner_layer_cls = StateOffsetLayer
    child_name = "offset_adapter"
    merge_remedy = "Keep the adapter beside the model, or call unload() to have the model without it."

    def _combined_fields(self, adapters, configs):
        if len({config.target for config in configs}) > 1:
            listed = ", ".join(f"{name!r} {config.target!r}" for name, config in zip(adapters, configs, strict=True))
            raise ValueError(
                f"cannot sum adapters of different targets: {listed}.\n"
                "  One offset goes to the state and one to the output. Activate both adapters instead."
            )
        return {}

from __future__ import annotations

from ssmtune.tuners.state_offset.layer import StateOffsetLayer
from ssmtune.tuners.state_tuner import StateTunerModel


class StateOffsetModel(StateTunerModel):
    """The tuner of State-offset Tuning; see `StateOffsetConfig`."""

    prefix = StateOffsetLayer.prefix
    tuner_layer_cls = StateOffsetLayer
    child_name = "offset_adapter"
    merge_remedy = "Keep the adapter beside the model, or call unload() to have the model without it."

from __future__ import annotations

from ssmtune.tuners.initial_state.layer import InitialStateLayer
from ssmtune.tuners.state_tuner import StateTunerModel


class InitialStateModel(StateTunerModel):
    """The tuner of Initial State Tuning; see `InitialStateConfig`."""

    prefix = InitialStateLayer.prefix
    tuner_layer_cls = InitialStateLayer
    child_name = "start_adapter"
    merge_remedy = (
        "Keep the adapter beside the model, hand the state over in a starting cache (ssmtune.starting_cache), or call "
        "unload() to have the model without it."
    )

    def _combined_fields(self, adapters, configs):
        return {"conv_state": any(config.conv_state for config in configs), "inference_scale": 1.0}

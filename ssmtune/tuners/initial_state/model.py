from __future__ import annotations

import torch

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
        return {"conv_state": any(config.conv_state for config in configs), "virtual_tokens": None}

    @classmethod
    @torch.no_grad()
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in cls._layers(model):
            if adapter_name in layer.initial_state_prefix:
                prefix = layer.initial_state_prefix[adapter_name]
                for key, _ in prefix.named_parameters():
                    del found[f"{name}.initial_state_prefix.{adapter_name}.{key}"]
                found |= {f"{name}.{cls.prefix}{kind}.{adapter_name}": state for kind, state in prefix().items()}
        return found

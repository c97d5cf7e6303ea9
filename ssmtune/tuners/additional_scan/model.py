from __future__ import annotations

from torch import nn

from ssmtune.mixers import patched_class
from ssmtune.tuners.additional_scan.config import AdditionalScanConfig
from ssmtune.tuners.additional_scan.layer import AdditionalScanLayer
from ssmtune.tuners.mixer_tuner import MixerTunerModel


class AdditionalScanModel(MixerTunerModel):
    """The tuner of Additional-scan; see `AdditionalScanConfig`."""

    prefix = AdditionalScanLayer.prefix
    tuner_layer_cls = AdditionalScanLayer
    child_name = "scan_adapter"
    merge_remedy = "Keep the adapter beside the model, or call unload() to have the model without it."

    def _check_mixers(self, peft_config: AdditionalScanConfig, mixers: list[nn.Module]) -> None:
        for mixer in mixers:
            if (reason := patched_class(mixer).why_no_extra_states) is not None:
                raise ValueError(
                    f"{type(mixer).__name__} has no place for states of an adapter's own: {reason}.\n"
                    "  Those of an adapter decay one by one. Use a state offset instead."
                )

from __future__ import annotations

from ssmtune.tuners.additional_scan.layer import AdditionalScanLayer
from ssmtune.tuners.mixer_tuner import MixerTunerModel


class AdditionalScanModel(MixerTunerModel):
    """The tuner of Additional-scan; see `AdditionalScanConfig`."""

    prefix = AdditionalScanLayer.prefix
    tuner_layer_cls = AdditionalScanLayer
    child_name = "scan_adapter"
    merge_remedy = "Keep the adapter beside the model, or call unload() to have the model without it."

from __future__ import annotations

from torch import nn

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
        heads = next((mixer for mixer in mixers if mixer.A_log.dim() == 1), None)
        if heads is not None:
            raise ValueError(
                f"{type(heads).__name__} has no place for states of an adapter's own.\n"
                "  They decay channel by channel, and all states of a head decay together. Use a state offset instead."
            )

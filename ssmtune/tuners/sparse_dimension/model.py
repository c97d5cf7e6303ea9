from __future__ import annotations

import torch

from ssmtune.tuners.adapter_file import adapted_place
from ssmtune.tuners.mixer_tuner import MixerTunerModel
from ssmtune.tuners.sparse_dimension.layer import SparseDimensionLayer


class SparseDimensionModel(MixerTunerModel):
    """The tuner of sparse dimension tuning; see `SparseDimensionConfig`. It can be merged into the weights."""

    prefix = SparseDimensionLayer.prefix
    tuner_layer_cls = SparseDimensionLayer
    child_name = "dimension_adapter"
    merge_remedy = "Call merge_and_unload(), which adds it to the weights for good."

    def _check_mixers(self, peft_config, mixers) -> None:
        without = [type(mixer).__name__ for mixer in mixers if not hasattr(mixer, "x_proj")]
        if without:
            raise ValueError(
                f"{without[0]} has no module x_proj, columns of which sparse dimension tuning changes.\n"
                "  Its heads have projections of their own. Use another method, such as s6 or state-offset."
            )

    def _names_per_row(self, names, kwargs):
        raise ValueError(
            f"adapter_names={names} cannot be used with sparse dimension tuning: a batch shares one A.\n"
            "  Run one batch per adapter, with set_adapter before each."
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            for _, layer in self._layers(self.model):
                layer.merge_into_mixer()
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in cls._layers(model):
            for kind, size in (("channels", layer.dim), ("states", layer.dstate)):
                key = f"{name}.{cls.prefix}{kind}.{adapter_name}"
                rows = torch.atleast_2d(found[key]).sort(-1).values
                if rows.min() < 0 or rows.max() >= size or (rows.diff() == 0).any():
                    raise ValueError(
                        f"{adapted_place(key)} are not different ones of {size} in the adapter file.\n"
                        "  The file is damaged, or of a model of other sizes. Copy the adapter again."
                    )
            layer.pending.pop(adapter_name, None)
        return found

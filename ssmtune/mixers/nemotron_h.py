"""Nemotron-H (transformers' `NemotronHForCausalLM`): Mamba-2 between attention, dense layers and experts."""

from __future__ import annotations

from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from .ssd_mixer import SsdMixer


class PatchedNemotronHMamba2Mixer(SsdMixer, NemotronHMamba2Mixer):
    """transformers' `NemotronHMamba2Mixer` on the operators of ssmtune."""

    original_class = NemotronHMamba2Mixer

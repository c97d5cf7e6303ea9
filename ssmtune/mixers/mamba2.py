"""Mamba-2 (transformers' `Mamba2ForCausalLM` and `Mamba2Model`)."""

from __future__ import annotations

from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .ssd_mixer import SsdMixer


class PatchedMamba2Mixer(SsdMixer, Mamba2Mixer):
    """transformers' `Mamba2Mixer` on the operators of ssmtune."""

    original_class = Mamba2Mixer

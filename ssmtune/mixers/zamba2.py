"""Zamba2 (transformers' `Zamba2ForCausalLM` and `Zamba2Model`): Mamba-2 beside shared attention."""

from __future__ import annotations

from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from .ssd_mixer import SsdMixer


class PatchedZamba2MambaMixer(SsdMixer, Zamba2MambaMixer):
    """transformers' `Zamba2MambaMixer` on the operators of ssmtune."""

    original_class = Zamba2MambaMixer

"""Bamba (transformers' `BambaForCausalLM` and `BambaModel`): Mamba-2 between attention."""

from __future__ import annotations

from transformers.models.bamba.modeling_bamba import BambaMixer

from .ssd_mixer import SsdMixer


class PatchedBambaMixer(SsdMixer, BambaMixer):
    """transformers' `BambaMixer` on the operators of ssmtune."""

    original_class = BambaMixer

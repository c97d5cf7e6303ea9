"""Mamba (transformers' `MambaForCausalLM` and `MambaModel`)."""

from __future__ import annotations

from transformers.models.mamba.modeling_mamba import MambaMixer

from .selective_mixer import SelectiveMixer


class PatchedMambaMixer(SelectiveMixer, MambaMixer):
    """transformers' `MambaMixer` on the operators of ssmtune."""

    original_class = MambaMixer

"""FalconMamba (transformers' `FalconMambaForCausalLM` and `FalconMambaModel`): Mamba with norms without weights."""

from __future__ import annotations

from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

from .selective_mixer import NormalizingMixer


class PatchedFalconMambaMixer(NormalizingMixer, FalconMambaMixer):
    """transformers' `FalconMambaMixer` on the operators of ssmtune."""

    original_class = FalconMambaMixer

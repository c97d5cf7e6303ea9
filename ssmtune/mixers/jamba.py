"""Jamba (transformers' `JambaForCausalLM` and `JambaModel`): Mamba with learned norms, between attention and experts.

Only the mixers change. The attention layers and the experts stay those of transformers.
"""

from __future__ import annotations

from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from .selective_mixer import NormalizingMixer


class PatchedJambaMambaMixer(NormalizingMixer, JambaMambaMixer):
    """transformers' `JambaMambaMixer` on the operators of ssmtune."""

    original_class = JambaMambaMixer

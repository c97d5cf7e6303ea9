"""Kimi Linear (transformers' `KimiLinearForCausalLM` and `KimiLinearModel`)."""

from __future__ import annotations

from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from .kimi_mixer import KimiMixer


class PatchedKimiLinearDeltaAttention(KimiMixer, KimiLinearDeltaAttention):
    """transformers' `KimiLinearDeltaAttention` on the operators of ssmtune."""

    original_class = KimiLinearDeltaAttention

"""Bailing Hybrid (transformers' `BailingHybridForCausalLM` and `BailingHybridModel`)."""

from __future__ import annotations

from torch import Tensor
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention

from .kimi_mixer import KimiMixer


class PatchedBailingHybridDeltaAttention(KimiMixer, BailingHybridDeltaAttention):
    """transformers' `BailingHybridDeltaAttention` on the operators of ssmtune."""

    original_class = BailingHybridDeltaAttention

    def output_gate(self, hidden_states: Tensor) -> Tensor:
        return self.g_proj(hidden_states)

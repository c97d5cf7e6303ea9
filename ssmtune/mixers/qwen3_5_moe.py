"""Qwen3.5 with experts (transformers' `Qwen3_5MoeForCausalLM` and what has its text model inside)."""

from __future__ import annotations

from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from .delta_mixer import DeltaMixer


class PatchedQwen3_5MoeGatedDeltaNet(DeltaMixer, Qwen3_5MoeGatedDeltaNet):
    """transformers' `Qwen3_5MoeGatedDeltaNet` on the operators of ssmtune."""

    original_class = Qwen3_5MoeGatedDeltaNet

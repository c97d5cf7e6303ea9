"""Qwen3.5 (transformers' `Qwen3_5ForCausalLM` and what has its text model inside)."""

from __future__ import annotations

from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from .delta_mixer import DeltaMixer


class PatchedQwen3_5GatedDeltaNet(DeltaMixer, Qwen3_5GatedDeltaNet):
    """transformers' `Qwen3_5GatedDeltaNet` on the operators of ssmtune."""

    original_class = Qwen3_5GatedDeltaNet

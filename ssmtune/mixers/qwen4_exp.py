"""The Qwen4 preview (transformers' `Qwen4ExpForCausalLM` and what has its text model inside)."""

from __future__ import annotations

from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextGatedDeltaNet

from .delta_mixer import DeltaMixer


class PatchedQwen4ExpTextGatedDeltaNet(DeltaMixer, Qwen4ExpTextGatedDeltaNet):
    """transformers' `Qwen4ExpTextGatedDeltaNet` on the operators of ssmtune."""

    original_class = Qwen4ExpTextGatedDeltaNet

"""Qwen3-Next (transformers' `Qwen3NextForCausalLM` and `Qwen3NextModel`): projections in the order of key heads."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from .delta_mixer import DeltaMixer


class PatchedQwen3NextGatedDeltaNet(DeltaMixer, Qwen3NextGatedDeltaNet):
    """transformers' `Qwen3NextGatedDeltaNet` on the operators of ssmtune."""

    original_class = Qwen3NextGatedDeltaNet

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        projected = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        *qkv, gate, b, a = self.fix_query_key_value_ordering(*projected)
        return gate, torch.cat([x.flatten(2) for x in qkv], dim=-1), (self.log_decays(a), b.sigmoid())

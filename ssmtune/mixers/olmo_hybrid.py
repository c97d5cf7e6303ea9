"""OLMo Hybrid (transformers' `OlmoHybridForCausalLM` and `OlmoHybridModel`): beta up to 2, projections apart."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

from .delta_mixer import DeltaMixer


class PatchedOlmoHybridGatedDeltaNet(DeltaMixer, OlmoHybridGatedDeltaNet):
    """transformers' `OlmoHybridGatedDeltaNet` on the operators of ssmtune."""

    original_class = OlmoHybridGatedDeltaNet

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        x = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1)
        gate = self.g_proj(hidden_states).unflatten(-1, (-1, self.head_v_dim))
        beta = self.b_proj(hidden_states).sigmoid() * (2 if self.allow_neg_eigval else 1)
        return gate, x, (self.log_decays(self.a_proj(hidden_states)), beta)

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.o_norm(y, gate).flatten(2))

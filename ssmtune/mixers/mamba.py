"""Mamba (transformers' `MambaForCausalLM` and `MambaModel`)."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer

from .selective_mixer import SelectiveMixer


class PatchedMambaMixer(SelectiveMixer, MambaMixer):
    """transformers' `MambaMixer` on the operators of ssmtune."""

    original_class = MambaMixer

    def forward(
        self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.mix(hidden_states, cache_params, attention_mask)

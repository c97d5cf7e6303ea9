"""What the mixers of Kimi's delta attention share: the gated delta rule with a decay for each channel of the keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .delta_mixer import DeltaMixer


class KimiMixer(DeltaMixer):
    """A `DeltaMixer` whose decays come from a module of their own, `forget_gate`."""

    @staticmethod
    def state_axes(mixer: nn.Module) -> tuple[int, ...]:
        return mixer.num_heads, mixer.head_dim, mixer.head_dim

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        x = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1)
        gate = self.output_gate(hidden_states).unflatten(-1, (-1, self.head_dim))
        return gate, x, (self.forget_gate(hidden_states), self.b_proj(hidden_states).sigmoid())

    def output_gate(self, hidden_states: Tensor) -> Tensor:
        """The gate (batch, seqlen, num_heads * head_dim) of the norm after the rule."""
        return self.g_b_proj(self.g_a_proj(hidden_states))

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.o_norm(y, gate).flatten(2))

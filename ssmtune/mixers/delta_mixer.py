"""What the mixers of the gated delta rule share: Gated DeltaNet, and with a decay for each channel Kimi's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ssmtune import ops

from .head_mixer import HeadMixer
from .recomputation import Recomputation
from .state_inputs import StateInputs


class DeltaMixer(HeadMixer):
    """A mixer of heads, each with a matrix that keys write values into and queries read.

    Its adapters see the channels of the values as dim = num_heads * head_v_dim, and those of the keys as states: to
    them the state S (num_heads, head_k_dim, head_v_dim) is its transpose, (dim, head_k_dim).
    """

    kernel = "causal_conv1d"
    why_no_extra_states = "the delta rule moves all states of a head together"

    @staticmethod
    def state_axes(mixer: nn.Module) -> tuple[int, ...]:
        return mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim

    @staticmethod
    def as_cached(state: Tensor) -> Tensor:
        return state.mT

    @property
    def act(self) -> nn.Module:
        return ACT2FN[self.activation]

    def scan_heads(
        self,
        made: Recomputation,
        u: Tensor,
        steps: tuple[Tensor, Tensor],
        pads: Tensor | None = None,
        state: Tensor | None = None,
        inputs: StateInputs | None = None,
        cu_seqlens: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs = self.by_heads(inputs or StateInputs())
        heads, values, states = self.state_axes(self)
        g, beta = steps
        if pads is not None:
            # At a pad the state neither decays nor is written to, also a learned initial one.
            g, beta = g.masked_fill(pads if g.dim() == 3 else pads.unsqueeze(-1), 0), beta.masked_fill(pads, 0)
        keys = (self.conv_dim - heads * values) // 2
        q, k, v = u.transpose(1, 2).split([keys, keys, heads * values], dim=-1)
        return self.scan(
            made,
            q.unflatten(-1, (-1, states)), k.unflatten(-1, (-1, states)), v.unflatten(-1, (heads, values)), g, beta,
            initial_state=inputs.initial_state if state is None else state,
            state_offset=inputs.state_offset, output_offset=inputs.output_offset,
            output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def scan(self, made: Recomputation, *args: Any, **kwargs: Any) -> Any:
        if self.recompute == "scan":
            return made.by(ops.gated_delta_rule, *args, **kwargs)
        return ops.gated_delta_rule(*args, **kwargs)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The gate (batch, seqlen, num_heads, head_v_dim), the input of the convolution, and g and beta."""
        gate = self.in_proj_z(hidden_states).unflatten(-1, (-1, self.head_v_dim))
        steps = self.log_decays(self.in_proj_a(hidden_states)), self.in_proj_b(hidden_states).sigmoid()
        return gate, self.in_proj_qkv(hidden_states), steps

    def log_decays(self, a: Tensor) -> Tensor:
        """g (batch, seqlen, num_heads), in float32 or wider."""
        wide = torch.promote_types(a.dtype, torch.float32)
        return -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.norm(y, gate).flatten(2))

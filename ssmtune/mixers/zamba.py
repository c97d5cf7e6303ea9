"""Zamba (transformers' `ZambaForCausalLM` and `ZambaModel`): Mamba in heads, beside shared attention.

A head is a block of channels with projections of its own from which its time step, B and C come: one scan with a group
of B and C for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

from .recomputation import Recomputation
from .selective_mixer import SelectiveMixer


class PatchedZambaMambaMixer(SelectiveMixer, ZambaMambaMixer):
    """transformers' `ZambaMambaMixer` on the operators of ssmtune."""

    original_class = ZambaMambaMixer

    def split_input(self, made: Recomputation, projected: Tensor) -> tuple[Tensor, Tensor]:
        # Channels of the input and of the gate take turns. The layout of the input is that of all that follows from it.
        x, z = projected.unflatten(-1, (-1, 2)).unbind(-1)
        return made.by(Tensor.contiguous, x), z

    def project_convolved(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = u.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))
        projected = torch.einsum("blhd,hrd->blhr", heads, self.x_proj_weight)
        return projected.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)

    def project_time_step(self, made: Recomputation, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        return made.by(_expand_time_step, dt, self.dt_proj_weight), self.dt_proj_bias.flatten()


def _expand_time_step(dt: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("blhr,hdr->blhd", dt, weight).flatten(-2)

"""Mamba-2 of state-spaces' package mamba_ssm (`mamba_ssm.Mamba2`, and `MambaLMHeadModel` made of it).

Beside the channels of the scan it may have some of a gated MLP, which come first in both projections.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rms_norm_ref
from torch import Tensor, nn

from .inference_params import InferenceParamsMixer
from .packing import find_sequences
from .ssd_mixer import SsdMixer


class PatchedMamba2(InferenceParamsMixer, SsdMixer, Mamba2):
    """mamba_ssm's `Mamba2` on the operators of ssmtune."""

    original_class = Mamba2
    intermediate_size = property(attrgetter("d_ssm"))
    num_heads = property(attrgetter("nheads"))
    head_dim = property(attrgetter("headdim"))
    n_groups = property(attrgetter("ngroups"))
    time_step_limit = property(attrgetter("dt_limit"))

    @staticmethod
    def state_axes(mixer: nn.Module) -> tuple[int, ...]:
        return mixer.nheads, mixer.headdim, mixer.d_state

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any | None = None,
    ) -> Tensor:
        if self.process_group is not None:
            raise ValueError(
                f"{type(self).__name__} is one of {self.world_size} that share a mixer (tensor parallel).\n"
                "  The operators of ssmtune run whole mixers. Give this one back by ssmtune.unpatch(model)."
            )
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if cu_seqlens is None and seq_idx is not None:
            cu_seqlens = find_sequences({"seq_idx": seq_idx}, *rows.shape[:2])
        return self.mix_sequences(rows, inference_params, cu_seqlens).view_as(u)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conv_dim = self.conv1d.weight.shape[0]
        projected = self.in_proj(hidden_states)
        gates = projected.shape[-1] - conv_dim - self.nheads
        return projected.split([gates, conv_dim, self.nheads], dim=-1)

    def skip_weight(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def scan_gate(self, gate: Tensor) -> Tensor | None:
        return None if self.rmsnorm else gate[..., -self.d_ssm :]

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        width = (gate.shape[-1] - self.d_ssm) // 2
        mlp_gate, mlp, gate = gate.split([width, width, self.d_ssm], dim=-1)
        if self.rmsnorm:
            y = self._norm(y, gate)
        return torch.cat([F.silu(mlp_gate) * mlp, y], dim=-1) if width else y

    def _norm(self, y: Tensor, gate: Tensor) -> Tensor:
        norm = self.norm
        if y.is_cuda or type(norm) is not RMSNorm:
            return norm(y, gate)
        # The module has a kernel for GPUs alone.
        return rms_norm_ref(
            y, norm.weight, norm.bias, gate, norm.eps, norm.group_size, norm_before_gate=norm.norm_before_gate
        )

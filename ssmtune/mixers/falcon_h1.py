"""Falcon-H1 (transformers' `FalconH1ForCausalLM` and `FalconH1Model`): Mamba-2 and attention side by side.

Projections have multipliers, and without a norm the scan itself is gated.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

from .ssd_mixer import SsdMixer


class PatchedFalconH1Mixer(SsdMixer, FalconH1Mixer):
    """transformers' `FalconH1Mixer` on the operators of ssmtune."""

    original_class = FalconH1Mixer

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
        return projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

    def scan_gate(self, gate: Tensor) -> Tensor | None:
        return None if self.mamba_rms_norm else gate

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.norm(y, gate) if self.mamba_rms_norm else y

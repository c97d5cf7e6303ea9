"""Granite 4 (transformers' `GraniteMoeHybridForCausalLM`): Mamba-2 between attention, with experts."""

from __future__ import annotations

from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from .ssd_mixer import SsdMixer


class PatchedGraniteMoeHybridMambaLayer(SsdMixer, GraniteMoeHybridMambaLayer):
    """transformers' `GraniteMoeHybridMambaLayer` on the operators of ssmtune."""

    original_class = GraniteMoeHybridMambaLayer

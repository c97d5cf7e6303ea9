"""Mamba of state-spaces' package mamba_ssm (`mamba_ssm.Mamba`, and `MambaLMHeadModel` made of it)."""

from __future__ import annotations

from operator import attrgetter

from mamba_ssm.modules.mamba_simple import Mamba

from .inference_params import InferenceParamsMixer


class PatchedMamba(InferenceParamsMixer, Mamba):
    """mamba_ssm's `Mamba` on the operators of ssmtune."""

    original_class = Mamba
    time_step_rank = property(attrgetter("dt_rank"))

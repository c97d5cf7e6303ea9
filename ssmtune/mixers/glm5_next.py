"""GLM-5-Next (transformers' `Glm5NextForConditionalGeneration` and its text model)."""

from __future__ import annotations

from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention

from .kimi_mixer import KimiMixer


class PatchedGlm5NextTextLinearAttention(KimiMixer, Glm5NextTextLinearAttention):
    """transformers' `Glm5NextTextLinearAttention` on the operators of ssmtune."""

    original_class = Glm5NextTextLinearAttention

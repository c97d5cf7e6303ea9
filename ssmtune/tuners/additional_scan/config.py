from __future__ import annotations

from dataclasses import dataclass, field

from ssmtune.tuners.mixer_config import MixerTunerConfig
from ssmtune.tuners.registration import add_peft_type


@dataclass
class AdditionalScanConfig(MixerTunerConfig):
    """Config of Additional-scan: states beside those that a mixer has, with a trained A, B and C of their own.

        g_t = exp(delta_t A') g_{t-1} + delta_t B'_t u_t      A' (dim, states), B'_t = W_B u_t, C'_t = W_C u_t
        y_t = C_t h_t + C'_t g_t + D u_t

    They start as slow as the slowest of the model, A' as its A of state 0, and W_C at zero.

    Args:
        states: how many per channel.
        init_weights: start with W_C at zero.

    The other fields are those of `MixerTunerConfig`.

    Raises:
        ValueError: a value is out of range, or does not go with another.

    Source: Yoshimura et al., MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba, 2025.
    """

    states: int = field(default=8, metadata={"help": "How many states to add to those of each channel."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("ADDITIONAL_SCAN")
        if type(self.states) is not int or self.states < 1:
            raise ValueError(
                f"states must be an integer of at least 1, got {self.states!r}.\n"
                "  It is the number of states that each channel gets beside its own."
            )

    @property
    def title(self) -> str:
        return "Additional-scan"

    @property
    def formula(self) -> str:
        return "y_t = C_t h_t + C'_t g_t + D u_t"

    @property
    def source(self) -> str:
        return (
            'Yoshimura, Hayashi and Maeda, "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba", ICLR '
            "2025,\n[arXiv 2411.03855](https://arxiv.org/abs/2411.03855)."
        )

    @property
    def card_tags(self) -> list[str]:
        return ["additional-scan"]

    def card_settings(self) -> dict[str, str]:
        return {"states": str(self.states), **super().card_settings()}

from __future__ import annotations

from dataclasses import dataclass, field

from ssmtune.tuners.mixer_config import MixerTunerConfig
from ssmtune.tuners.registration import add_peft_type


@dataclass
class SparseDimensionConfig(MixerTunerConfig):
    """Config of sparse dimension tuning (SDT): a few channels and states of A, and these channels of W_B and W_C.

        A[d, n] -> A[d, n] exp(a[d, n])         for the chosen channels d and, in each, the chosen states n
        W_B[:, d] -> W_B[:, d] + b[:, d]        and W_C alike, for the chosen channels

    They are chosen by `choose_dimensions`, which `ssmtune.training.train` calls: of all of them, after a few steps of
    training, those whose A has changed most. Everything starts at zero, where the model is its base.

    Args:
        channels: share of the channels to train, at least one.
        states: share of the states of each of them, at least one.
        warm_up_steps: of the training that they are chosen by.

    The other fields are those of `MixerTunerConfig`.

    Raises:
        ValueError: a value is out of range, or does not go with another.

    Source: Galim et al., Parameter-Efficient Fine-Tuning of State Space Models, 2025.
    """

    channels: float = field(default=0.01, metadata={"help": "Share of the channels to train, at least one."})
    states: float = field(default=0.1, metadata={"help": "Share of the states of each of them, at least one."})
    warm_up_steps: int = field(default=50, metadata={"help": "Steps of the training that both are chosen by."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("SPARSE_DIMENSION")
        for name in ("channels", "states"):
            share = getattr(self, name)
            if not (isinstance(share, (int, float)) and 0 < share <= 1):
                raise ValueError(
                    f"{name} must be more than 0 and at most 1, got {share!r}.\n"
                    f"  It is the share of the {name} that are trained. 1 trains all of them."
                )
        if type(self.warm_up_steps) is not int or self.warm_up_steps < 1:
            raise ValueError(
                f"warm_up_steps must be an integer of at least 1, got {self.warm_up_steps!r}.\n"
                "  It is the number of steps of the training that channels and states are chosen by."
            )

    @property
    def title(self) -> str:
        return "Sparse dimension tuning"

    @property
    def formula(self) -> str:
        return "A[d, n] exp(a[d, n]), W_B[:, d] + b[:, d], W_C[:, d] + c[:, d] for the chosen channels d and states n"

    @property
    def source(self) -> str:
        return (
            'Galim, Kang, Zeng, Koo and Lee, "Parameter-Efficient Fine-Tuning of State Space Models", ICML 2025,\n'
            "[arXiv 2410.09016](https://arxiv.org/abs/2410.09016)."
        )

    @property
    def card_tags(self) -> list[str]:
        return ["sparse-dimension-tuning"]

    def card_settings(self) -> dict[str, str]:
        chosen = {"channels": f"{self.channels:.1%}", "states of each": f"{self.states:.1%}"}
        return chosen | {"chosen after": f"{self.warm_up_steps} steps"} | super().card_settings()

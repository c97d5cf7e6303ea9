from __future__ import annotations

import math
from dataclasses import dataclass, field

from ssmtune.tuners.registration import add_peft_type
from ssmtune.tuners.state_config import StateTunerConfig


@dataclass
class InitialStateConfig(StateTunerConfig):
    """Config of Initial State Tuning: a trained state that every sequence starts from.

        h_0 = initial_state             (dim, dstate), or B A of a rank; zero in the pre-trained model
        x_{1 - width} ... x_0 = conv    (dim, width - 1), what the convolution sees first; likewise, with conv_state

    In evaluation mode h_0 is `inference_scale` times that, as in S0 tuning (https://arxiv.org/abs/2604.01168).
    A continued sequence (a cache, a step of generation) goes on from its own state, not from this one.

    Args:
        inference_scale: how many times the trained h_0 is taken in evaluation mode; in training it is taken once.
        conv_state: also learn what the causal convolution in front of the scan sees left of the first token.
        virtual_tokens: they leave both tensors behind, exactly (prefix tuning).

    The other fields are those of `StateTunerConfig`.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

    conv_state: bool = field(
        default=False,
        metadata={"help": "Also learn the (dim, width - 1) inputs that the convolution sees left of the first token."},
    )

    inference_scale: float = field(
        default=1.0,
        metadata={"help": "How many times the trained h_0 is taken in evaluation mode; in training it is taken once."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.inference_scale, (int, float)) and 0 < self.inference_scale < math.inf):
            raise ValueError(
                f"inference_scale must be a positive number, got {self.inference_scale!r}.\n"
                "  It is how many times the trained state is taken in evaluation mode. Leave it out for once."
            )
        if self.inference_scale != 1 and self.rank is not None:
            raise ValueError(
                f"inference_scale={self.inference_scale} does not go with rank={self.rank}.\n"
                "  The product of a rank has a scale already: alpha. Leave one of them out."
            )
        self.peft_type = add_peft_type("INITIAL_STATE")
        if self.virtual_tokens is not None:
            self.conv_state = True

    @property
    def title(self) -> str:
        return "Initial State Tuning"

    @property
    def formula(self) -> str:
        return "h_0 = initial_state"

    @property
    def card_tags(self) -> list[str]:
        return ["initial-state-tuning"]

    def card_settings(self) -> dict[str, str]:
        settings = {"learned convolution state": "yes" if self.conv_state else "no"}
        if self.inference_scale != 1:
            settings["scale of the state in evaluation mode"] = f"{self.inference_scale:g}"
        return settings | super().card_settings()

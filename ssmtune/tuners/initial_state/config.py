from __future__ import annotations

from dataclasses import dataclass, field

from ssmtune.tuners.registration import add_peft_type
from ssmtune.tuners.state_config import StateTunerConfig


@dataclass
class InitialStateConfig(StateTunerConfig):
    """Config of Initial State Tuning: a trained state that every sequence starts from.

        h_0 = initial_state             (dim, dstate), or B A of a rank; zero in the pre-trained model
        x_{1 - width} ... x_0 = conv    (dim, width - 1), what the convolution sees first; likewise, with conv_state

    A continued sequence (a cache, a step of generation) goes on from its own state, not from this one.

    Args:
        conv_state: also learn what the causal convolution in front of the scan sees left of the first token.
        virtual_tokens: None, or how many virtual tokens per mixer to train in place of both tensors (prefix tuning).
            They enter the mixer before a text, and what they leave behind is its initial state and convolution state,
            exactly. They are folded into these when the adapter is saved. With `reparametrize` they go through an MLP.
        rank: None for a whole matrix, or the rank of a low-rank one.
        alpha: scales the low-rank product by alpha / rank.
        dropout: share of the rank terms of the low-rank product that a training step leaves out.
        reparametrize: hidden units of an MLP to train the tensor through; None trains the tensor itself.
        init_weights: start at zero.
        target_modules: mixers to adapt; all if None.
        exclude_modules: mixers to leave alone.
        layers_to_transform: layers to adapt; all if None.
        layers_pattern: where layers_to_transform counts.
        modules_to_save: other modules trained in full.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

    conv_state: bool = field(
        default=False,
        metadata={"help": "Also learn the (dim, width - 1) inputs that the convolution sees left of the first token."},
    )

    virtual_tokens: int | None = field(
        default=None,
        metadata={"help": "Train so many virtual tokens per mixer, whose state is the initial one; folded when saved."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("INITIAL_STATE")
        if self.virtual_tokens is None:
            return
        if type(self.virtual_tokens) is not int or self.virtual_tokens < 1:
            raise ValueError(
                f"virtual_tokens must be None or an integer of at least 1, got {self.virtual_tokens!r}.\n"
                "  It is the number of virtual tokens of every mixer. Leave it out to train the state itself."
            )
        if self.rank is not None:
            raise ValueError(
                f"virtual_tokens={self.virtual_tokens} does not go with rank={self.rank}: either makes the state.\n"
                "  Leave one of them out."
            )
        self.conv_state = True

    def folded(self) -> InitialStateConfig:
        folded = super().folded()
        folded.virtual_tokens = None
        return folded

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
        return {"learned convolution state": "yes" if self.conv_state else "no", **super().card_settings()}

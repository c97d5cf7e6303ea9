"""The config fields that State-offset Tuning and Initial State Tuning share."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from ssmtune.tuners.mixer_config import MixerTunerConfig


@dataclass
class StateTunerConfig(MixerTunerConfig):
    """What `StateOffsetConfig` and `InitialStateConfig` share beside which mixers they adapt.

    Args:
        rank: None for a whole matrix, or the rank of a low-rank one.
        alpha: scales the low-rank product by alpha / rank.
        dropout: share of the rank terms of the low-rank product that a training step leaves out.
        reparametrize: hidden units of an MLP to train the tensor through; None trains the tensor itself.
        virtual_tokens: None, or how many virtual tokens per mixer to train in place of the tensor. They enter the mixer
            before a text, and what they leave behind is that tensor. They are folded into it when the adapter is saved.
            With `reparametrize` they go through an MLP.

    The other fields are those of `MixerTunerConfig`.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

    rank: int | None = field(
        default=None,
        metadata={"help": "None trains the whole (dim, dstate) matrix; r trains it as B A, B (dim, r), A (r, dstate)."},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Scales the low-rank product by alpha / rank. None leaves it unscaled."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "In training, leave out each of the rank terms of the low-rank product this often."},
    )
    reparametrize: int | None = field(
        default=None,
        metadata={"help": "Train the tensor through an MLP with this many hidden units, folded into it when saved."},
    )

    virtual_tokens: int | None = field(
        default=None,
        metadata={"help": "Train so many virtual tokens per mixer and take the state they leave; folded when saved."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(
                f"rank must be None or an integer of at least 1, got {self.rank!r}.\n"
                "  Leave it out to train the whole (dim, dstate) matrix."
            )
        if self.alpha is not None and self.rank is None:
            raise ValueError(
                f"alpha={self.alpha!r} was given without a rank: it scales the low-rank product by alpha / rank.\n"
                "  Set rank, or leave alpha out and choose the learning rate instead."
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha must be a positive number, got {self.alpha!r}.\n"
                "  It scales the low-rank product by alpha / rank. Leave it out for no scaling."
            )
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(
                f"dropout must be at least 0 and below 1, got {self.dropout!r}.\n"
                "  It is the share of the rank terms that a training step leaves out. Leave it out for none."
            )
        if self.dropout and self.rank is None:
            raise ValueError(
                f"dropout={self.dropout!r} was given without a rank: it leaves out terms of the low-rank product.\n"
                "  Set rank, or leave dropout out."
            )
        if self.reparametrize is not None and (type(self.reparametrize) is not int or self.reparametrize < 1):
            raise ValueError(
                f"reparametrize must be None or an integer of at least 1, got {self.reparametrize!r}.\n"
                "  It is the number of hidden units of the MLP. Leave it out to train the tensor itself."
            )
        if self.virtual_tokens is not None and (type(self.virtual_tokens) is not int or self.virtual_tokens < 1):
            raise ValueError(
                f"virtual_tokens must be None or an integer of at least 1, got {self.virtual_tokens!r}.\n"
                "  It is the number of virtual tokens of every mixer. Leave it out to train the state itself."
            )
        if self.virtual_tokens is not None and self.rank is not None:
            raise ValueError(
                f"virtual_tokens={self.virtual_tokens} does not go with rank={self.rank}: either makes the state.\n"
                "  Leave one of them out."
            )
        if self.reparametrize is not None and self.rank is not None:
            raise ValueError(
                f"reparametrize={self.reparametrize} does not go with rank={self.rank}: either makes the matrix.\n"
                "  Leave one of them out."
            )

    def folded(self) -> StateTunerConfig:
        """The config of what is stored: the tensors themselves, whatever they were trained through."""
        folded = copy.copy(self)
        folded.reparametrize = folded.virtual_tokens = None
        return folded

    @property
    def source(self) -> str:
        return (
            'Kang, Galim, Zeng, Lee, Koo and Cho, "State-offset Tuning: State-based Parameter-Efficient Fine-Tuning '
            'for\nState Space Models", ACL 2025, [arXiv 2503.03499](https://arxiv.org/abs/2503.03499).'
        )

    def card_settings(self) -> dict[str, str]:
        low_rank = f"{self.rank}, scaled by {(self.alpha or self.rank) / self.rank:g}" if self.rank else "whole"
        settings = {"rank": low_rank} | ({"dropout": f"{self.dropout:g}"} if self.dropout else {})
        return settings | super().card_settings()

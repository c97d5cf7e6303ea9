"""The config fields that State-offset Tuning and Initial State Tuning share."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

from peft.config import PeftConfig

from ssmtune.tuners.adapter_file import check_readable
from ssmtune.tuners.model_card import write_card


@dataclass
class StateTunerConfig(PeftConfig):
    """Fields of both methods; see `StateOffsetConfig` and `InitialStateConfig`."""

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
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at zero, so that the model equals its base. False draws noise, for tests only."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the mixers to adapt, or one regular expression. None adapts every mixer."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of mixers to leave alone, or one regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt, counted from 0. None adapts every layer."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that layers_to_transform counts in, where it is not the first one."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and store with the adapter."}
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
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
        if self.reparametrize is not None and self.rank is not None:
            raise ValueError(
                f"reparametrize={self.reparametrize} does not go with rank={self.rank}: either makes the matrix.\n"
                "  Leave one of them out."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform cannot be used with target_modules as a regular expression.\n"
                "  Put the layers into the expression, or give target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} was given without layers_to_transform.\n"
                "  It only says where those indices count. Set layers_to_transform, or leave it out."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        check_readable(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        stored = self.folded()
        super(StateTunerConfig, stored).save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), stored)

    def folded(self) -> StateTunerConfig:
        """The config of what is stored: the tensors themselves, whatever they were trained through."""
        folded = copy.copy(self)
        folded.reparametrize = None
        return folded

    @property
    def title(self) -> str:
        """What a model card calls the method."""
        raise NotImplementedError

    @property
    def formula(self) -> str:
        """What it does, on one line."""
        raise NotImplementedError

    @property
    def card_tags(self) -> list[str]:
        """By which tags it is found."""
        raise NotImplementedError

    def card_settings(self) -> dict[str, str]:
        """How it was set, for a model card."""
        low_rank = f"{self.rank}, scaled by {(self.alpha or self.rank) / self.rank:g}" if self.rank else "whole"
        settings = {"rank": low_rank} | ({"dropout": f"{self.dropout:g}"} if self.dropout else {})
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        settings["layers"] = "all" if layers is None else ", ".join(map(str, layers))
        if self.modules_to_save:
            settings["also trained"] = ", ".join(f"`{name}`" for name in self.modules_to_save)
        return settings

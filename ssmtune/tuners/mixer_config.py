"""The config fields of every method that adds to the mixers of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft.config import PeftConfig

from ssmtune.tuners.adapter_file import check_readable
from ssmtune.tuners.model_card import write_card


@dataclass
class MixerTunerConfig(PeftConfig):
    """Which mixers a method adapts, and what its model card says.

    Args:
        init_weights: start at zero, where the model equals its base; False draws noise, for tests only.
        target_modules: mixers to adapt, by names or one regular expression; all if None.
        exclude_modules: mixers to leave alone, likewise.
        layers_to_transform: layers to adapt; all if None.
        layers_pattern: the list that layers_to_transform counts in, where it is not the first one.
        modules_to_save: other modules trained in full, and stored with the adapter.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

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
        super(MixerTunerConfig, stored).save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), stored)

    def folded(self) -> MixerTunerConfig:
        """The config of what is stored, whatever it was trained through."""
        return self

    @property
    def title(self) -> str:
        """What a model card calls the method."""
        raise NotImplementedError

    @property
    def formula(self) -> str:
        """What it does, on one line."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Who described it, as a line of Markdown."""
        raise NotImplementedError

    @property
    def card_tags(self) -> list[str]:
        """By which tags it is found."""
        raise NotImplementedError

    def card_settings(self) -> dict[str, str]:
        """How it was set, for a model card."""
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        settings = {"layers": "all" if layers is None else ", ".join(map(str, layers))}
        if self.modules_to_save:
            settings["also trained"] = ", ".join(f"`{name}`" for name in self.modules_to_save)
        return settings

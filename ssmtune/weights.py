"""The weights of a model: how many are trained, and a directory that holds them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ssmtune.models import no_progress_bars, portable_name


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write an adapter in peft's format, or a whole model, into a directory.

    A base model from the package is recorded by its name there, so that the adapter can be used on another machine.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        with no_progress_bars():
            model.save_pretrained(directory)
        return
    places = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.base_model_name_or_path = portable_name(config.base_model_name_or_path)
        # "auto" would ask the hub whether the vocabulary has grown
        model.save_pretrained(str(directory), save_embedding_layers=False)
    finally:
        for name, config in model.peft_config.items():
            config.base_model_name_or_path = places[name]

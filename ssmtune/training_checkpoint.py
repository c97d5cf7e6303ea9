"""What a training run goes on from: the tensors of a checkpoint, and the settings that both must have in common.

Beside these tensors and a JSON file a checkpoint holds the optimizer, the schedule and the random state, which are
Trainer's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from safetensors import SafetensorError
from torch import nn

from ssmtune.config import ConfigError, TrainConfig
from ssmtune.data import EncodedExamples
from ssmtune.reasons import first_line

PROGRESS = "progress.json"
BEST = "best.safetensors"
TRAINABLE = "trainable.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors and of what an adapter has chosen: all that a run goes on from."""
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad} | _chosen(model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in chosen.items()}


def _chosen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The integers that adapters have beside their tensors."""
    return {
        f"{name}.{key}": index
        for name, module in model.named_modules()
        if isinstance(module, BufferDict)
        for key, index in module.items()
        if not index.is_floating_point()
    }


@torch.no_grad()
def assign(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_tensors` gave."""
    places = dict(model.named_parameters()) | _chosen(model)
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def settings_of(config: TrainConfig, data: EncodedExamples, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common."""
    digest = hashlib.sha256()
    for item in data.items:
        digest.update(json.dumps([item.input_ids, item.labels]).encode())
    tensors = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors.update(f"{name}{tuple(parameter.shape)}".encode())
    train = dataclasses.asdict(config)
    for key in ("log_every", "save_every"):
        train.pop(key)
    return {"settings": {**train, "data": digest.hexdigest()[:16], "trainable tensors": tensors.hexdigest()[:16]}}


def read_checkpoint(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How far a run had come.

    Raises:
        ConfigError: the checkpoint cannot be read, or has other settings.
    """
    try:
        past = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        stored = past["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}.\n"
            "  Remove it to resume from none, or start again with --overwrite."
        ) from None
    wanted = settings["settings"]
    differing = [key for key in wanted if stored.get(key) != wanted[key]]
    if differing:
        listed = ", ".join(
            f"{key} ({stored.get(key)} then, {wanted[key]} now)" if key in TrainConfig.__dataclass_fields__ else key
            for key in differing
        )
        raise ConfigError(
            f"checkpoint {checkpoint} belongs to a run with other settings: {listed}.\n"
            "  Resume with the same settings, or start again with --overwrite or another --out."
        )
    return past


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint in whatever goes wrong while its tensors are read.

    Raises:
        ValueError: with the reason and a way out.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read: {first_line(error)}\n"
            "  It is damaged, or was not written by ssmtune. Remove it to resume from none, or use --overwrite."
        ) from error

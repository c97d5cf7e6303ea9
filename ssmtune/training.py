"""Fine-tuning on transformers.Trainer: one function, one run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ssmtune.config import EvalConfig, TrainConfig
from ssmtune.data import Example


@dataclass
class TrainResult:
    """What a run came to.

    `curve` has one dict per log line: step, loss, lr, grad_norm, tokens, seconds; or step, dev_loss. `train_loss` is the
    mean of the last log interval, `dev_loss` belongs to the weights the model was left with.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    dev_loss: float | None
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: nn.Module,
    tokenizer,
    train_examples: Sequence[Example],
    dev_examples: Sequence[Example],
    config: TrainConfig,
    out: Path | None,
    *,
    lr: float | None = None,
    max_length: int = 512,
    evaluation: EvalConfig | None = None,
    callbacks: Sequence = (),
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train what is trainable in a model on examples; `lr` stands in where config.lr is None."""
    raise NotImplementedError

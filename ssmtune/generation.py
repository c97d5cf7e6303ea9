"""Text from a model, and the likelihood of given texts, in batches of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class TargetScore(NamedTuple):
    """Summed natural-log probability of a target after its prompt, and its number of tokens."""

    log_likelihood: float
    tokens: int


def generate_texts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_length: int | None = None,
    use_cache: bool = True,
) -> list[str]:
    """Continue each prompt, stopping at the end-of-text token; greedy unless a temperature is given."""
    raise NotImplementedError


def target_log_likelihood(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 16,
    *,
    max_length: int | None = None,
    add_eos: bool = False,
) -> list[TargetScore]:
    """Score each target after its prompt: one (log_likelihood, tokens) per pair, in their order."""
    raise NotImplementedError


@torch.no_grad()
def _placeholder() -> None: ...

"""The loss on target tokens, without the logits of all other positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmtune.data import IGNORED


def target_losses(model: nn.Module, batch: Mapping[str, Tensor], base: nn.Module | None = None) -> Tensor:
    """Cross-entropy of every labelled token in a batch padded on the right.

    Args:
        model: what to call.
        batch: input_ids, attention_mask and labels, each (batch, seqlen).
        base: the model inside `model` if that is a wrapper of another kind, such as DistributedDataParallel.

    Returns:
        (batch, positions) float32, zero where a row has no label.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return next_token_losses(model, batch["labels"][:, 1:], base, **inputs, use_cache=False)


def next_token_losses(model: nn.Module, targets: Tensor, base: nn.Module | None = None, **inputs: Any) -> Tensor:
    """Cross-entropy of the tokens that follow those of a call.

    Prompts are most of a batch and the vocabulary is most of a small model, so logits are made only at positions where
    some row has a label next.

    Args:
        model: what to call.
        targets: (batch, seqlen) or shorter: what follows each token, -100 where nothing is to be learnt.
        base: the model inside `model` if that is a wrapper of another kind, such as DistributedDataParallel.
        inputs: what to call it with.

    Returns:
        (batch, positions) float32, zero where a row has no label.
    """
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)
    targets = targets[:, positions]
    logits = logits_at(model, positions + virtual_tokens(model if base is None else base), base, **inputs)
    return token_losses(logits, targets)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32 of targets (...) under logits (..., vocabulary), zero where a target is -100."""
    # two axes, the vocabulary last: with the vocabulary in the middle the softmax strides through memory
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets)


def logits_at(model: nn.Module, positions: Tensor, base: nn.Module | None = None, **inputs: Any) -> Tensor:
    """Logits (batch, positions, vocabulary) of a call at some positions, made there alone where the model can."""
    if "logits_to_keep" in inspect.signature(innermost(model if base is None else base).forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def virtual_tokens(model: nn.Module) -> int:
    """How many positions prompt tuning puts in front of each text; prefix tuning puts none, but fills the cache."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        return 0
    return config.num_virtual_tokens


def innermost(model: nn.Module) -> nn.Module:
    """The model of transformers in a model of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pad_id(tokenizer) -> int:
    """The token to pad with: it is masked, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


class evaluating:
    """Evaluation mode and no gradients for a while."""

    def __init__(self, model: nn.Module):
        self.model, self.no_grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()
        self.no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self.no_grad.__exit__(*error)
        self.model.train(self.was_training)

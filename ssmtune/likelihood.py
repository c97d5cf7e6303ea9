"""The loss on target tokens, without the logits of all other positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmtune.data import IGNORED


def target_losses(model: nn.Module, batch: Mapping[str, Tensor], base: nn.Module | None = None) -> Tensor:
    """Cross-entropy of every labelled token in a batch padded on the right.

    Prompts are most of a batch and the vocabulary is most of a small model, so logits are made only at positions where
    some row has a label next.

    Args:
        model: what to call.
        batch: input_ids, attention_mask and labels, each (batch, seqlen).
        base: the model inside `model` if that is a wrapper of another kind, such as DistributedDataParallel.

    Returns:
        (batch, positions) float32, zero where a row has no label.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED).any(0).nonzero().squeeze(1)
    inner = base if base is not None else model
    options = {"use_cache": False}
    selects = "logits_to_keep" in inspect.signature(_innermost(inner).forward).parameters
    if selects:
        options["logits_to_keep"] = positions + virtual_tokens(inner)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options).logits
    if not selects:
        logits = logits[:, positions + virtual_tokens(inner)]
    labels = labels[:, positions]
    # two axes, the vocabulary last: with the vocabulary in the middle the softmax strides through memory
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels)


def virtual_tokens(model: nn.Module) -> int:
    """How many positions prompt tuning puts in front of each text; prefix tuning puts none, but fills the cache."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":
        return 0
    return config.num_virtual_tokens


def _innermost(model: nn.Module) -> nn.Module:
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

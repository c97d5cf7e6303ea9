"""Whether a model of a choice task can tell its own inputs from others by how sure it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from ssmtune.effects.context import Context
from ssmtune.tasks.choice import first_token_logits

# Of the inputs of the task that a detector has to let through.
KEPT = 0.95


def measure(model: nn.Module, context: Context) -> dict[str, Any] | None:
    """AUROC and FPR95 of two scores of an input, higher for what is of the task; None for tasks without choices.

    With z_c the logit of the first token of choice c after the prompt, on 64 prompts of each kind:

        softmax = max_c exp(z_c) / sum_c exp(z_c)        (Hendrycks and Gimpel, ICLR 2017)
        energy  = log sum_c exp(z_c)                     (Liu et al., NeurIPS 2020, at temperature 1)
    """
    task = context.task
    if not task.choices or not context.outside:
        return None
    # choices that begin alike count once
    begins = {context.tokenizer(choice, add_special_tokens=False)["input_ids"][0]: choice for choice in task.choices}
    scores = []
    for prompts in (context.inside, context.outside):
        logits, _ = first_token_logits(model, context.tokenizer, prompts, list(begins.values()), task.max_length)
        scores.append({"softmax": logits.softmax(-1).amax(-1).numpy(), "energy": logits.logsumexp(-1).numpy()})
    inside, outside = scores
    return {
        name: {"auroc": auroc(inside[name], outside[name]), "fpr95": fpr95(inside[name], outside[name])}
        for name in inside
    }


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The chance that an input of the task has the higher score of a pair, a tie counted as half, in percent."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left") + np.searchsorted(ordered, inside, "right")
    return float(50 * below.mean() / len(outside))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of other inputs above the highest threshold that 95 % of the task's inputs reach, in percent."""
    threshold = np.sort(inside)[::-1][int(np.ceil(KEPT * len(inside))) - 1]
    return float(100 * np.mean(outside >= threshold))

"""How much worse a model has become at text like that its base was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ssmtune.data import IGNORED, Encoded
from ssmtune.effects.context import Context
from ssmtune.generation import score_encoded
from ssmtune.likelihood import pad_id

WINDOW = 512
MOST_WINDOWS = 64
BATCH = 4


def measure(model: nn.Module, context: Context) -> dict[str, float] | None:
    """The rise of the loss on held-out text from the base to the model.

        forgetting = mean over tokens of log p_base(token | before) - log p_model(token | before), in nats per token

    Both see the text in windows of 512 tokens, the first of which is not scored. None for a text of one token.
    """
    windows = [context.tokens[start : start + WINDOW] for start in range(0, len(context.tokens), WINDOW)]
    windows = [window for window in windows[:MOST_WINDOWS] if len(window) > 1]
    if not windows:
        return None
    items = [Encoded(window, [IGNORED, *window[1:]]) for window in windows]
    loss = token_loss(model, items, context)
    before = context.remembered("loss", lambda: token_loss(context.base, items, context))
    return {"nats_per_token": loss - before, "perplexity": exp(loss), "base_perplexity": exp(before)}


def token_loss(model: nn.Module, items: Sequence[Encoded], context: Context) -> float:
    """Mean loss per labelled token, in nats."""
    scores = score_encoded(model, items, pad_id(context.tokenizer), BATCH)
    return -math.fsum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores)


def exp(loss: float) -> float:
    """A perplexity; a diverged model has a loss whose exponential overflows."""
    return math.exp(loss) if loss < 700 else math.inf

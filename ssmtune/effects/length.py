"""Whether a model still reads well beyond the length that it was trained on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssmtune.data import IGNORED, Encoded
from ssmtune.effects.context import Context
from ssmtune.effects.forgetting import exp, token_loss

TIMES = (1, 2, 4)
MOST_WINDOWS = 4


def measure(model: nn.Module, context: Context) -> dict[str, Any] | None:
    """Perplexity of the same held-out tokens at the end of texts 1, 2 and 4 times as long as the longest in training.

    More to read before the same tokens can only help a model that reads on; the perplexity of one that does not
    extrapolate rises. None where the text is shorter than the longest of these.
    """
    length, longest = context.task.max_length, max(TIMES) * context.task.max_length
    ends = range(longest, len(context.tokens) + 1, longest)[:MOST_WINDOWS]
    if not ends:
        return None
    perplexity = {}
    for times in TIMES:
        items = []
        for end in ends:
            tokens = context.tokens[end - times * length : end]
            # the first token of the shortest has nothing before it
            items.append(Encoded(tokens, [IGNORED] * (len(tokens) - length + 1) + tokens[1 - length :]))
        perplexity[f"{times}x"] = exp(token_loss(model, items, context))
    return {"training_length": length, "perplexity": perplexity}

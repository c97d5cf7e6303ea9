"""Tasks measured by the likelihood of their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssmtune.data import Example
from ssmtune.tasks.task import Task


@dataclass(frozen=True)
class ContinuationTask(Task):
    """Perplexity of each target given its prompt.

        perplexity = exp(-sum log p(target | prompt) / number of target tokens)

    Tokens are the model's own, so perplexities compare methods on one model; `bits_per_character` compares models too.
    """

    def evaluate(self, model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> dict[str, float]:
        from ssmtune.generation import target_log_likelihood

        scores = target_log_likelihood(
            model,
            tokenizer,
            [example.prompt for example in examples],
            [example.target for example in examples],
            batch_size,
            max_length=self.max_length,
        )
        log_likelihood = math.fsum(score.log_likelihood for score in scores)
        loss = -log_likelihood / max(1, sum(score.tokens for score in scores))
        characters = sum(len(example.target) for example in examples)
        return {
            # A diverged model has a loss whose exponential overflows.
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_character": -log_likelihood / math.log(2) / max(1, characters),
            "loss": loss,
        }

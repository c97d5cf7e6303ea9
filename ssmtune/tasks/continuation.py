"""Tasks measured by the likelihood of their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssmtune.data import Example
from ssmtune.tasks.task import Task
from ssmtune.tasks.terms import Terms, perplexity_terms

if TYPE_CHECKING:
    from ssmtune.generation import TargetScore


@dataclass(frozen=True)
class ContinuationTask(Task):
    """Perplexity of each target given its prompt.

        perplexity = exp(-sum log p(target | prompt) / number of target tokens)

    Tokens are the model's own, so perplexities compare methods on one model; `bits_per_character` compares models too.
    """

    def answers(self, model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> list[TargetScore]:
        from ssmtune.generation import target_log_likelihood

        return target_log_likelihood(
            model,
            tokenizer,
            [example.prompt for example in examples],
            [example.target for example in examples],
            batch_size,
            max_length=self.max_length,
        )

    def score(self, answers: Sequence[TargetScore], examples: Sequence[Example]) -> dict[str, float]:
        log_likelihood = math.fsum(answer.log_likelihood for answer in answers)
        loss = -log_likelihood / max(1, sum(answer.tokens for answer in answers))
        characters = sum(len(example.target) for example in examples)
        return {
            # A diverged model has a loss whose exponential overflows.
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_character": -log_likelihood / math.log(2) / max(1, characters),
            "loss": loss,
        }

    def terms(self, answers: Sequence[TargetScore], examples: Sequence[Example]) -> Terms:
        return perplexity_terms([answer.log_likelihood for answer in answers], [answer.tokens for answer in answers])

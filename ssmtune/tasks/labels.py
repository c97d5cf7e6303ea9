"""Tasks whose answer is one word or one number, which the model has to write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssmtune.data import Example
from ssmtune.tasks import agreement
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.task import with_groups
from ssmtune.tasks.terms import Terms, pearson_terms


@dataclass(frozen=True)
class LabelTask(GenerationTask):
    """Accuracy of the label that the model writes, with F1 and Matthews' correlation where asked for.

    The answer is the line that greedy decoding gives. One that is no label is `invalid`, and counts as a label that is
    wrong for its example: it lowers F1 and Matthews' correlation too.

    Args:
        labels: the answers; the last is the positive one of F1 and Matthews' correlation.
        metrics: "accuracy", "f1", "matthews".
    """

    max_new_tokens: int = 8
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)

    def score(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        answers, groups = self._labels(hypotheses, examples), [example.group for example in examples]
        scores = with_groups(self._scores, answers, examples, groups)
        return scores | {"invalid": float(sum(text not in self.labels for text in hypotheses))}

    def terms(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> Terms | None:
        if self.metric != "matthews":
            return super().terms(hypotheses, examples)
        positive, answers = self.labels[-1], self._labels(hypotheses, examples)
        return pearson_terms(
            [answer == positive for answer in answers], [example.target.strip() == positive for example in examples]
        )

    def _labels(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> list[str]:
        """The answers, and a wrong label in the place of what is none."""
        truths = [example.target.strip() for example in examples]
        wrong = {truth: next(label for label in self.labels if label != truth) for truth in set(truths)}
        return [text if text in self.labels else wrong[truth] for text, truth in zip(hypotheses, truths, strict=True)]

    def _scores(self, answers: list[str], examples: list[Example]) -> dict[str, float]:
        truths, positive = [example.target.strip() for example in examples], self.labels[-1]
        known = {
            "accuracy": lambda: agreement.accuracy(answers, truths),
            "f1": lambda: agreement.f1(answers, truths, positive),
            "matthews": lambda: agreement.matthews(answers, truths, positive),
        }
        return {name: 100.0 * known[name]() for name in self.metrics}


@dataclass(frozen=True)
class NumberTask(GenerationTask):
    """Pearson's and Spearman's correlation of the numbers that the model writes with the right ones, times 100.

    The right number is the first reference; the target is its rounded form. An answer that is no number of the scale is
    `invalid`, and counts as that end of the scale which is farther from the truth.

    Args:
        scale: the least and the greatest number.
    """

    max_new_tokens: int = 8
    scale: tuple[float, float] = (0.0, 1.0)

    def score(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        numbers, truths = self._numbers(hypotheses, examples)
        return {
            "pearson": 100.0 * agreement.pearson(numbers, truths),
            "spearman": 100.0 * agreement.spearman(numbers, truths),
            "invalid": float(sum(self._number(text) is None for text in hypotheses)),
        }

    def terms(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> Terms | None:
        if self.metric == "pearson":
            return pearson_terms(*self._numbers(hypotheses, examples))
        return super().terms(hypotheses, examples)

    def _numbers(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> tuple[list[float], list[float]]:
        """The answers, with the farther end of the scale in the place of what is none; and the right numbers."""
        truths = [float(example.references[0]) for example in examples]
        low, high = self.scale
        numbers = [
            (low if truth - low > high - truth else high) if number is None else number
            for number, truth in zip(map(self._number, hypotheses), truths, strict=True)
        ]
        return numbers, truths

    def _number(self, text: str) -> float | None:
        try:
            number = float(text)
        except ValueError:
            return None
        # NaN is within no scale
        return number if math.isfinite(number) and self.scale[0] <= number <= self.scale[1] else None

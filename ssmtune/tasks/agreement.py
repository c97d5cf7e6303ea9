"""How well answers agree with the truth, as GLUE measures it; the numbers of scikit-learn and scipy."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np


def accuracy(answers: Sequence, truths: Sequence) -> float:
    """Share of right answers."""
    return sum(map(operator.eq, answers, truths)) / max(1, len(truths))


def f1(answers: Sequence, truths: Sequence, positive: object) -> float:
    """2 tp / (2 tp + fp + fn) of the `positive` label; 0 without any."""
    hits = sum(answer == truth == positive for answer, truth in zip(answers, truths, strict=True))
    total = sum(label == positive for label in (*answers, *truths))
    return 2 * hits / total if total else 0.0


def matthews(answers: Sequence, truths: Sequence, positive: object) -> float:
    """Matthews' correlation of two labels, which is Pearson's of being the `positive` one."""
    return pearson([answer == positive for answer in answers], [truth == positive for truth in truths])


def pearson(answers: Sequence[float], truths: Sequence[float]) -> float:
    """Pearson's correlation; 0 where it is undefined because one side is constant."""
    left, right = (np.asarray(values, dtype=np.float64) for values in (answers, truths))
    # before the mean is taken away: rounding would make noise of a constant
    if not len(left) or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    left, right = left - left.mean(), right - right.mean()
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def spearman(answers: Sequence[float], truths: Sequence[float]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(answers), _ranks(truths))


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]

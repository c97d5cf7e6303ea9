"""Average ranks of methods over tasks, and how far apart two must be (Demšar, JMLR 2006)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Below that the test has next to no power, and tasks are far from a sample of tasks.
FEWEST_TASKS = 5
_STEPS = 400


@dataclass(frozen=True)
class Ranks:
    """Ranks of the methods that have a score on every task; 1 is best.

    Args:
        mean: method -> its rank, averaged over tasks, best first.
        tasks: how many.
        critical_difference: of Nemenyi's test at 5 %: mean ranks that differ by less are not told apart; None below
            FEWEST_TASKS tasks.
    """

    mean: dict[str, float]
    tasks: int
    critical_difference: float | None


def average_ranks(scores: Mapping[str, Mapping[str, float]]) -> Ranks:
    """Rank methods on each task, then average.

    Args:
        scores: task -> method -> its score, higher is better; equal ones share the mean of their ranks.
    """
    methods = [method for method in next(iter(scores.values()), {}) if all(method in row for row in scores.values())]
    ranks = {method: [_rank(method, row, methods) for row in scores.values()] for method in methods}
    mean = {method: sum(ranks[method]) / len(scores) for method in methods}
    enough = len(scores) >= FEWEST_TASKS and len(methods) > 1
    return Ranks(
        mean=dict(sorted(mean.items(), key=lambda item: item[1])),
        tasks=len(scores),
        critical_difference=critical_difference(len(methods), len(scores)) if enough else None,
    )


def critical_difference(methods: int, tasks: int) -> float:
    """Nemenyi's q sqrt(k (k + 1) / (6 n)) at 5 % for k methods on n tasks."""
    return _nemenyi_q(methods) * math.sqrt(methods * (methods + 1) / (6 * tasks))


def _rank(method: str, row: Mapping[str, float], methods: list[str]) -> float:
    better = sum(row[other] > row[method] for other in methods)
    equal = sum(row[other] == row[method] for other in methods)
    return better + (equal + 1) / 2


def _nemenyi_q(k: int) -> float:
    """The 95 % point of the range of k standard normal values, over sqrt(2), by bisection."""
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _range_below(middle, k) < 0.95 else (low, middle)
    return high / math.sqrt(2)


def _range_below(width: float, k: int) -> float:
    """P(range of k standard normal values < width) = k integral of phi(x) (Phi(x + width) - Phi(x))^(k - 1)."""
    step = 18.0 / _STEPS
    total = 0.0
    for i in range(_STEPS + 1):
        x = -9.0 + i * step
        total += math.exp(-x * x / 2) * (_normal(x + width) - _normal(x)) ** (k - 1)
    return k * total * step / math.sqrt(2 * math.pi)


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2

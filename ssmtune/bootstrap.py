"""Differences between methods on one task: a paired bootstrap over examples and seeds.

Both methods of a pair are measured on the same test examples with the same seeds. One draw takes as many examples and
as many seeds as there are, with replacement, the same for both methods, and computes the difference of their metrics on
them, averaged over the seeds drawn (Koehn, EMNLP 2004, for examples; Owen, Ann. Appl. Stat. 2007, for two factors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ssmtune.tasks.terms import Terms

DRAWS = 2000
_AT_ONCE = 250


@dataclass(frozen=True)
class Difference:
    """How much higher the metric of one method is than that of another.

    Args:
        mean: over the seeds that both have.
        low, high: the 2.5 and 97.5 % points of the draws.
        p: twice the share of draws on the rarer side of zero, two-sided.
        adjusted: p by Holm's rule for all pairs of the task.
    """

    mean: float
    low: float
    high: float
    p: float
    adjusted: float = 1.0

    def reversed(self) -> Difference:
        """Of the second method to the first."""
        return Difference(-self.mean, -self.high, -self.low, self.p, self.adjusted)


def paired_differences(
    runs: Mapping[str, Mapping[int, Terms]], draws: int = DRAWS
) -> dict[tuple[str, str], Difference]:
    """The differences of all pairs of methods.

    Args:
        runs: method -> seed -> the terms of its metric on the test examples.
        draws: bootstrap draws.

    Returns:
        (first, second) -> first minus second, for the pairs of methods in their order that share a seed and have a
        finite metric in every draw.
    """
    drawn: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def scores(method: str, seeds: tuple[int, ...]) -> np.ndarray:
        if (method, seeds) not in drawn:
            drawn[method, seeds] = bootstrap_means([runs[method][seed] for seed in seeds], draws)
        return drawn[method, seeds]

    found = {}
    for first, second in combinations(runs, 2):
        seeds = tuple(sorted(runs[first].keys() & runs[second].keys()))
        if not seeds:
            continue
        difference = scores(first, seeds) - scores(second, seeds)
        if np.isfinite(difference).all():
            found[first, second] = _summary(difference)
    return _with_holm(found)


def bootstrap_means(terms: Sequence[Terms], draws: int = DRAWS) -> np.ndarray:
    """The mean metric over seeds on the data, then of each draw: (1 + draws,).

    The draws depend on the numbers of seeds and examples alone, so that those of two methods are paired.
    """
    seeds, examples = len(terms), len(terms[0].rows)
    rng = np.random.default_rng(0)
    means = [np.mean([part.metric(part.rows.sum(0, dtype=np.float64)) for part in terms])]
    for start in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - start)
        counts = rng.multinomial(examples, np.full(examples, 1 / examples), size).astype(np.float64)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        metrics = np.stack([part.metric(counts @ part.rows) for part in terms], 1)
        # a seed that was not drawn does not matter, whatever its metric
        means.extend(np.where(weights > 0, weights * metrics, 0.0).sum(1))
    return np.array(means)


def _summary(difference: np.ndarray) -> Difference:
    drawn = difference[1:]
    low, high = np.percentile(drawn, [2.5, 97.5])
    # the data are a draw too, so that p is never 0
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    return Difference(float(difference[0]), float(low), float(high), float(min(1.0, 2 * rarer / (len(drawn) + 1))))


def _with_holm(found: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """The same with Holm's adjustment: the k-th least of n values of p times n - k + 1, never below the one before."""
    adjusted, least = {}, 0.0
    for place, pair in enumerate(sorted(found, key=lambda pair: found[pair].p)):
        least = max(least, min(1.0, found[pair].p * (len(found) - place)))
        adjusted[pair] = least
    return {pair: Difference(each.mean, each.low, each.high, each.p, adjusted[pair]) for pair, each in found.items()}

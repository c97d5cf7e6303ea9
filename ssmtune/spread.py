"""The mean of a few values, and how sure it is."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

# 97.5 % points of Student's t for 1..30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Some values, one per seed.

    The standard deviation, and the half-width of the 95 % interval of the mean, are None where one value or an infinite
    one leaves them undefined.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return statistics.stdev(self.values)

    @property
    def interval(self) -> float | None:
        n, deviation = len(self.values), self.deviation
        return None if deviation is None else student_t(n - 1) * deviation / math.sqrt(n)


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution; from a table, then by the first terms of its expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)

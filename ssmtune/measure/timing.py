"""Timing that verifies first and interleaves what it compares, on the CPU and on a GPU."""

import functools
import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5
"""Largest RMS(error) / RMS(expected) of a scan's float32 result that is still called right."""


GPU_FACTOR = 10
"""Times the two tolerances on a GPU: its special-function units take exp2 to 2 ulp, and a slow decay adds that up."""

WARM_AGAIN_BELOW = 2.0
"""Seconds."""

FLUSH_BYTES = 2**28
"""Written before each run on a GPU: more than any L2 cache holds."""

HEAD_START = 4_000_000
"""Clock cycles, some 2 ms, that a GPU waits before each run, so that the host has launched all of it by then."""


def tolerances(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """Both of them for results in `dtype`, to which a half type is rounded in the end."""
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    factor = GPU_FACTOR if device == "cuda" else 1
    return factor * VALUE_TOLERANCE + rounding, factor * GRADIENT_TOLERANCE + rounding


class Disagreement(RuntimeError):
    """A case whose results are not those of the same in float64: its speed means nothing."""


@dataclass(frozen=True)
class Lap:
    """One stage of one run, in seconds."""

    wall: float  # on a GPU: between events in its stream
    cpu: float  # of the whole process, all threads


class Case(Protocol):
    """Something to time."""

    label: str
    stages: tuple[str, ...]

    def time(self) -> list[Lap]:
        """Run once: one lap for each stage."""

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        """Run once: the results by name, and the seconds it took.

        With `channels`, those channels of the (batch, dim, seqlen) results only.
        """


class HostClock:
    """Reads the clocks of the host."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """The start of the first stage, or the end of one."""
        self._marks.append((time.perf_counter(), time.process_time()))

    def laps(self) -> list[Lap]:
        """One for each stage."""
        return [
            Lap(end[0] - start[0], end[1] - start[1]) for start, end in zip(self._marks, self._marks[1:], strict=False)
        ]


class GpuClock:
    """Records events in the stream of a GPU, whose cache it empties first.

    The GPU is given something to wait for before the first event. So the host has launched the whole run by the time it
    starts, and what is measured is the work of the GPU, not the speed of Python.
    """

    def __init__(self) -> None:
        _flush_buffer().zero_()
        torch.cuda._sleep(HEAD_START)
        self._events: list[torch.cuda.Event] = []
        self._used: list[float] = []

    def mark(self) -> None:
        """The start of the first stage, or the end of one."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        self._used.append(time.process_time())

    def laps(self) -> list[Lap]:
        """Wait for the GPU: one for each stage."""
        torch.cuda.synchronize()
        walls = [1e-3 * a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]
        used = [b - a for a, b in zip(self._used, self._used[1:], strict=False)]
        return [Lap(*pair) for pair in zip(walls, used, strict=True)]


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def laps(run: Iterator[None], device: str = "cpu") -> list[Lap]:
    """Time a generator that yields at the end of each of its stages."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        clock = GpuClock() if device == "cuda" else HostClock()
        clock.mark()
        for _ in run:
            clock.mark()
        return clock.laps()
    finally:
        if collecting:
            gc.enable()


def gpu_peak_memory(run: Iterator[None]) -> int:
    """Run a generator to its end on a GPU: the most memory allocated above what was before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in run:
        pass
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def error(expected: Tensor, actual: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected): NaN or infinite where `actual` is."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class Verified:
    """A case whose results were found right, how far off they are, and how long that one run took."""

    case: Case
    errors: dict[str, float]
    seconds: float


def verify(
    case: Case,
    expected: dict[str, Tensor],
    channels: slice | None = None,
    value_tolerance: float = VALUE_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> Verified:
    """Hold a case to float64 results. Only a `Verified` can be timed.

    Args:
        case: what is about to be timed.
        expected: float64 results by name; "out" is a value, everything else a gradient. Only these are looked at.
        channels: channels of the case's (batch, dim, seqlen) results that `expected` holds; all by default.
        value_tolerance: largest error of "out".
        gradient_tolerance: largest error of everything else.

    Raises:
        Disagreement: a result is further away than float32 rounding explains.
    """
    actual, seconds = case.values(channels)
    errors = {}
    for name, right in expected.items():
        if name not in actual:
            continue
        errors[name] = error(right, actual[name])
        limit = value_tolerance if name == "out" else gradient_tolerance
        if not errors[name] <= limit:
            raise Disagreement(
                f"{case.label}: {name} is {errors[name]:.1e} away from its float64 value, more than {limit:.0e}.\n"
                "  A wrong result has no speed, so it is not timed. Run the tests of this operator first."
            )
    return Verified(case, errors, seconds)


@dataclass
class Summary:
    """Median and spread of a sample."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Summary":
        ordered = sorted(sample)
        last = len(ordered) - 1
        return cls(median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])

    def times(self, factor: float) -> "Summary":
        """The same in another unit."""
        return Summary(factor * self.median, factor * self.p20, factor * self.p80)


@dataclass
class Times:
    """All laps of one case: `stages` in order, and their sum under "total"."""

    stages: tuple[str, ...]
    runs: list[list[Lap]] = field(default_factory=list)

    def summary(self, stage: str, clock: str) -> Summary:
        """Median and spread of a stage, or of the "total", on the "wall" or the "cpu" clock, in milliseconds."""

        def of_run(run: list[Lap]) -> float:
            chosen = run if stage == "total" else [run[self.stages.index(stage)]]
            return 1e3 * sum(getattr(lap, clock) for lap in chosen)

        return Summary.of([of_run(run) for run in self.runs])


def interleave(verified: Sequence[Verified], seconds: float, least: int = 3, most: int = 40) -> list[Times]:
    """Time cases in turns, so that a busy moment of the machine falls on all of them.

    Every other round goes backwards: none always follows the one that leaves the caches worst.

    Each case gets about `seconds`: a slow one runs `least` times, a fast one up to `most`, spread evenly over the
    rounds. Verifying was the warm-up of a case that takes seconds; the others run once more, which does not count.

    Args:
        verified: cases, each verified.
        seconds: time for each case.
        least: runs of the slowest case.
        most: runs of the fastest case.

    Returns:
        The times of each case, in order.
    """
    counts = []
    for entry in verified:
        once = entry.seconds
        if once < WARM_AGAIN_BELOW:
            once = min(once, sum(lap.wall for lap in entry.case.time()))
        counts.append(min(most, max(least, int(seconds / max(once, 1e-9)))))
    rounds = max(counts)
    times = [Times(entry.case.stages) for entry in verified]
    for turn in range(rounds):
        cases = list(zip(verified, counts, times, strict=True))
        for entry, count, result in cases if turn % 2 == 0 else reversed(cases):
            if (turn + 1) * count // rounds > turn * count // rounds:
                result.runs.append(entry.case.time())
    return times

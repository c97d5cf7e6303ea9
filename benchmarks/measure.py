"""Timing that verifies first and interleaves what it compares, and peak memory in a process of its own."""

import gc
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5
"""Largest RMS(error) / RMS(expected) of a scan's float32 result that is still called right."""


WARM_AGAIN_BELOW = 2.0
"""Seconds."""


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Both of them for results in `dtype`, to which a half type is rounded in the end."""
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return VALUE_TOLERANCE + rounding, GRADIENT_TOLERANCE + rounding


class Disagreement(RuntimeError):
    """A case whose results are not those of the same in float64: its speed means nothing."""


@dataclass(frozen=True)
class Lap:
    """One stage of one run, in seconds."""

    wall: float
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


def laps(run: Iterator[None]) -> list[Lap]:
    """Time a generator that yields at the end of each of its stages."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        result = []
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in run:
            now, used = time.perf_counter(), time.process_time()
            result.append(Lap(now - wall, used - cpu))
            wall, cpu = time.perf_counter(), time.process_time()
        return result
    finally:
        if collecting:
            gc.enable()


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
        for entry, count, result in zip(verified, counts, times, strict=True):
            if (turn + 1) * count // rounds > turn * count // rounds:
                result.runs.append(entry.case.time())
    return times


def _high_water() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _probe(connection, function: Callable[..., Iterator[None]], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        run = function(*arguments)
        next(run)
        gc.collect()
        reset = Path("/proc/self/clear_refs")
        if os.access(reset, os.W_OK):
            reset.write_text("5")  # VmHWM starts again from what is resident now
        before = _high_water()
        next(run, None)
        connection.send(_high_water() - before)
    except Exception as failure:  # the parent reports it with the name of the case
        connection.send(failure)
        raise


def peak_memory(function: Callable[..., Iterator[None]], *arguments: Any, threads: int = 1) -> int:
    """Peak memory of the second part of a generator, above what is resident after the first, in a process of its own.

    Args:
        function: module-level generator function: builds its inputs, warms up, yields once, does the work, ends.
        arguments: what it is called with.
        threads: PyTorch threads in that process.

    Returns:
        Bytes.

    Raises:
        RuntimeError: the process died, most likely for want of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(theirs, function, arguments, threads))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = RuntimeError(
            f"{function.__name__}{arguments} died while its peak memory was measured.\n"
            "  It probably ran out of memory. Measure a smaller shape."
        )
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer

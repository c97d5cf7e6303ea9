"""One run: each case is verified, then timed in turns with those it is compared with, and its numbers are kept."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssmtune.measure import results
from ssmtune.measure.bounds import Limits, bounds
from ssmtune.measure.inputs import Shape
from ssmtune.measure.scan_cases import forget_inputs
from ssmtune.measure.specs import Spec
from ssmtune.measure.timing import Case, Disagreement, Summary, Times, Verified, interleave, tolerances, verify

FULL_VERIFICATION = (2048, 2**22)
"""Longer sequences, or more elements, are verified on a few channels: the float64 recurrence takes time."""

CLOCKS = {"cpu": {"cpu time": "cpu", "wall time": "wall"}, "cuda": {"gpu time": "wall"}}
"""What is kept of a lap on each device, and what it is called."""

PER_SECOND = {"ms": 1e3, "us": 1e6}


class Session:
    """Collects and prints the rows of one run, and appends them to a file as they come if it is given one.

    Args:
        environment: where and when.
        device: cpu or cuda.
        seconds: for each case.
        threads: of PyTorch on the CPU; each case is timed with each of these numbers.
        path: a CSV file to append to, or None.
        deadline: of `time.monotonic`; what would start after it is left out.
        limits: of this machine; the bounds they set are kept beside the times.
    """

    def __init__(
        self,
        environment: results.Environment,
        device: str = "cpu",
        seconds: float = 0.4,
        threads: Sequence[int] = (1,),
        path: Path | None = None,
        deadline: float | None = None,
        limits: Limits | None = None,
    ):
        self.environment, self.device, self.seconds = environment, device, seconds
        self.threads = tuple(threads) if device == "cpu" else (0,)
        self.path, self.deadline, self.limits = path, deadline, limits
        self.rows: list[results.Row] = []
        self.wrong: list[Spec] = []
        self.left_out: list[Spec] = []
        self._stored = 0

    def measure(self, specs: Sequence[Spec], threads: Iterable[int] | None = None, most: int = 40) -> None:
        """Verify each spec, then time all of them in turns, once for each number of threads."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.left_out += specs
            return
        self._use_threads(max(self.threads))
        verified = self._verify(specs)
        for count in (threads or self.threads) if verified else ():
            self._use_threads(count)
            for entry, sample in zip(verified, interleave(verified, self.seconds, most=most), strict=True):
                self._record(entry, sample, count)
        self._bound(entry.case.spec for entry in verified)
        self._forget()
        self.store()

    def peaks(self, specs: Sequence[Spec]) -> None:
        """The peak memory of each spec on a GPU, above its inputs and with its results, in tensors of its sequences."""
        for spec in specs:
            if spec in self.wrong or spec in self.left_out:
                continue
            tensor = spec.dtype.itemsize * spec.shape.batch * spec.shape.dim * spec.shape.seqlen
            case = self._case(spec)
            case.peak()
            value = case.peak() / tensor
            self.add(spec, 0, "peak memory", "tensors", value)
            self._print(spec, 0, f"{value:10.2f} tensors")
        self._forget()
        self.store()

    def add(self, spec: Spec, threads: int, metric: str, unit: str, value: Summary | float, **columns: str) -> None:
        """Keep one number."""
        columns = {**spec.columns, **columns, "threads": threads, "metric": metric, "unit": unit}
        self.rows.append(self.environment.row(value, **columns))

    def store(self) -> None:
        """Append what is new to the file."""
        if self.path is not None and len(self.rows) > self._stored:
            results.append(self.path, self.rows[self._stored :])
            self._stored = len(self.rows)

    def _case(self, spec: Spec) -> Case:
        return spec.case()

    def _use_threads(self, count: int) -> None:
        if self.device == "cpu":
            torch.set_num_threads(count)

    def _forget(self) -> None:
        forget_inputs()

    def _verify(self, specs: Sequence[Spec]) -> list[Verified]:
        right: dict[Spec, dict[str, Tensor]] = {}
        for spec in specs:
            oracle = spec.oracle()
            if oracle not in right:
                right[oracle] = oracle.expected(looked_at(spec.shape))
        if self.device == "cpu":
            forget_inputs()  # the long ones take gigabytes, and processes that run cases make their own
        verified = []
        for spec in specs:
            wanted = {name: value for name, value in right[spec.oracle()].items() if name == "out" or name in spec.wrt}
            limits = tolerances(spec.dtype, spec.device)
            try:
                entry = verify(self._case(spec), wanted, looked_at(spec.shape), *limits)
            except Disagreement as wrong:
                self._refuse(spec, str(wrong))
                continue
            except Exception as failure:
                # too little memory for a peer, or a kernel that does not start: the rest is still worth timing
                if self.device == "cpu":
                    raise
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                self._refuse(spec, f"{spec.label} did not run: {reason}")
                continue
            if self.device == "cuda":  # the first run compiled kernels
                entry = replace(entry, seconds=sum(lap.wall for lap in entry.case.time()))
            verified.append(entry)
            for name, value in entry.errors.items():
                self.add(spec, max(self.threads), f"error of {name}", "1", value)
        return verified

    def _refuse(self, spec: Spec, message: str) -> None:
        self.wrong.append(spec)
        print(f"error: {message}", file=sys.stderr, flush=True)

    def _record(self, entry: Verified, times: Times, threads: int) -> None:
        spec = entry.case.spec
        scale = PER_SECOND[spec.unit] / PER_SECOND["ms"] / spec.repeats
        for metric, clock in CLOCKS[self.device].items():
            self.add(spec, threads, metric, spec.unit, times.summary("total", clock).times(scale))
            if len(times.stages) == 2:
                self.add(spec, threads, metric, spec.unit, times.summary("bwd", clock).times(scale), pass_="bwd")
        total = times.summary("total", CLOCKS[self.device][results.time_metric(threads)]).times(scale)
        spread = f"({total.p20:.2f} to {total.p80:.2f}, n = {len(times.runs)})"
        self._print(spec, threads, f"{total.median:10.2f} {spec.unit}  {spread}")

    def _bound(self, specs: Iterable[Spec]) -> None:
        if self.limits is None:
            return
        # one for all backends and layouts that do the same work
        different = {
            replace(spec, backend="bound", tags=tuple(tag for tag in spec.tags if tag != "channels-first"))
            for spec in specs
        }
        for spec in sorted(different, key=lambda spec: spec.label):
            for name, least in bounds(spec, self.limits).items():
                self.add(spec, max(self.threads), f"least time by {name}", "ms", least)

    def _print(self, spec: Spec, threads: int, text: str) -> None:
        sizes = f"{spec.direction:6}  {spec.shape!s:>16}  {threads}  {spec.backend:12}  {spec.variant:26}"
        print(f"  {sizes}{text}", flush=True)


def looked_at(shape: Shape) -> slice | None:
    """The channels that are verified: all, or four where there is a lot to compute."""
    longest, most = FULL_VERIFICATION
    if shape.seqlen <= longest and shape.batch * shape.dim * shape.seqlen <= most:
        return None
    return slice(0, None, max(1, shape.dim // 4))

"""Times a whole training step of a Mamba, forward and backward, against other ways to train it.

`python -m benchmarks.training_step` measures the shapes of Mamba-130m (24 layers, width 768; 1024 tokens of vocabulary)
and of the model in the package (8 layers, width 256), and appends its rows to benchmarks/results/<device>.csv; with
--quick it takes two narrow layers and stores nothing. On a GPU (`--device cuda`) it takes Mamba-130m and Mamba-1.4b in
bfloat16 on 8 x 2048 tokens, the optimizer included, against transformers on mamba_ssm's kernels and the state methods
as their authors released them.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peak_memory import peak_memory
from benchmarks.step_cases import StepCase, StepSpec, check_losses, forget_models, memory_probe, verify_small
from benchmarks.stored import default_file, store
from benchmarks.worker import KEPT, Workers
from ssmtune.measure import results
from ssmtune.measure.peers import mamba_ssm_scan
from ssmtune.measure.specs import OURS
from ssmtune.measure.timing import GPU_FACTOR, Disagreement, Summary, Verified, interleave, laps

OP = "training_step"
METHODS = ("full", "state-offset", "lora")
GPU_METHODS = ("state-offset", "initial-state", "lora", "full")
GPU_MODELS = {"Mamba-130m": (24, 768), "Mamba-1.4b": (48, 2048)}
"""Layers and width."""


def groups(backend: str, quick: bool) -> list[list[StepSpec]]:
    """What is timed in turns with what.

    mambapy at 4 x 512 keeps every state of every layer, some 25 GiB with 24 layers, so that comparison has 4 layers.
    transformers' own scan is left out: its backward pass is quadratic in seqlen and takes minutes for one step.
    """

    def ours(batch: int, seqlen: int) -> list[StepSpec]:
        return [StepSpec(name, method, batch, seqlen) for method in METHODS for name in (backend, "gemm")]

    def peers(batch: int, seqlen: int) -> list[StepSpec]:
        return [StepSpec(name, "full", batch, seqlen) for name in ("unbind loop", "mambapy")]

    if quick:
        return [[replace(spec, layers=2, width=64) for spec in (*ours(1, 64), *peers(1, 64))]]
    short = [*ours(1, 512), *peers(1, 512)]
    kept = [replace(spec, tags=(KEPT,)) for spec in short if spec.backend != "unbind loop"]
    base = [replace(spec, layers=8, width=256, vocabulary=8192) for spec in ours(4, 512)]
    shallow = [replace(spec, layers=4) for spec in (StepSpec(backend, "full", 4, 512), *peers(4, 512))]
    planned = [short, ours(4, 512), base, shallow]
    if platform.libc_ver()[0] == "glibc":
        planned.insert(1, kept)
    return planned


def gpu_groups(device: str, quick: bool) -> list[list[StepSpec]]:
    """What is measured of each model on a GPU, one step after the other."""
    upstream = [("transformers", "full"), ("transformers", "lora")] if mamba_ssm_scan.why_not() is None else []
    ways = [*(("ssmtune", method) for method in GPU_METHODS), *upstream]
    ways += [("authors", "state-offset"), ("authors", "initial-state")]
    common = {"dtype": "bfloat16", "device": device, "optimizer": True}
    if quick:
        return [[StepSpec(*way, 2, 16, 2, 32, 64, 4, **common) for way in ways]]
    return [
        [StepSpec(*way, 8, 2048, layers, width, 50_280, **common) for way in ways]
        for layers, width in GPU_MODELS.values()
    ]


class Session:
    """Collects and prints the rows of one run."""

    def __init__(self, environment: results.Environment, threads: int):
        self.environment, self.threads = environment, threads
        self.rows: list[results.Row] = []

    def measure(self, specs: Sequence[StepSpec], seconds: float) -> None:
        """Time a group of verified specs in turns, and keep the times if all had the same loss."""
        with Workers() as workers:
            workers.threads = self.threads
            cases = [workers.case(spec) for spec in specs]
            verified = []
            for case in cases:
                fast = case.spec.backend in (*OURS, "gemm")
                once = sum(lap.wall for lap in case.time()) if fast else float("inf")
                verified.append(Verified(case, {}, once))
            times = interleave(verified, seconds, least=2, most=10)
            check_losses([case for case in cases if case.spec.backend != "gemm"])
        for spec, sample in zip(specs, times, strict=True):
            for clock in ("cpu", "wall"):
                for stage, name in (("fwd", "fwd"), ("bwd", "bwd"), ("total", "fwdbwd")):
                    self.add(spec, name, f"{clock} time", "ms", sample.summary(stage, clock))
            total = sample.summary("total", "wall")
            print(
                f"  {spec.batch} x {spec.seqlen}  {spec.backend:12}  {spec.variant:24}{total.median:10.1f} ms"
                f"  ({total.p20:.1f} to {total.p80:.1f}, n = {len(sample.runs)})",
                flush=True,
            )

    def memory(self, specs: Sequence[StepSpec]) -> None:
        """Peak memory of a step above the model itself, gradients included, each in a process of its own."""
        for spec in specs:
            if spec.backend == "gemm" or spec.tags:
                continue
            value = peak_memory(memory_probe, spec, threads=self.threads) / 2**20
            self.add(spec, "fwdbwd", "peak memory", "MiB", value)
            print(f"  {spec.batch} x {spec.seqlen}  {spec.backend:12}  {spec.variant:24}{value:10.0f} MiB", flush=True)

    def add(self, spec: StepSpec, direction: str, metric: str, unit: str, value: Summary | float) -> None:
        """Keep one number."""
        self.rows.append(
            self.environment.row(
                value,
                op=OP,
                pass_=direction,
                backend=spec.backend,
                dtype=spec.dtype,
                batch=spec.batch,
                dim=spec.width,
                seqlen=spec.seqlen,
                dstate=spec.dstate,
                threads=self.threads,
                variant=spec.variant,
                metric=metric,
                unit=unit,
            )
        )


class GpuSession(Session):
    """One model at a time, in this process; rows are stored as they come."""

    def __init__(self, environment: results.Environment, device: str, path: Path | None, deadline: float):
        super().__init__(environment, 0)
        self.device, self.path, self.deadline = device, path, deadline
        self.wrong: list[StepSpec] = []
        laps(iter((None,)), device)  # allocates what empties the cache, before any memory is counted

    def measure(self, specs: Sequence[StepSpec], seconds: float) -> None:
        """Time each spec, its memory beside it, and keep its numbers if it has the same loss as those before it."""
        first = None
        for spec in specs:
            if time.monotonic() > self.deadline:
                print(f"  left out, for the time is over: {spec.label}")
                continue
            stored = len(self.rows)
            try:
                if spec.backend != "authors":  # its scans are held to ours by a test
                    verify_small(spec, GPU_FACTOR if self.device == "cuda" else 1)
                case = self._measure(spec, seconds)
                check_losses([first or case, case])
                first = first or case
            except torch.OutOfMemoryError:
                self.add(spec, "step", "out of memory", "1", 1.0)
                print(f"  {spec.label}: out of memory", flush=True)
            except RuntimeError as failure:  # a wrong result, or a kernel that does not start: the rest goes on
                del self.rows[stored:]
                self.wrong.append(spec)
                print(f"error: {spec.label}: {failure}", file=sys.stderr, flush=True)
            forget_models()
            if self.path is not None and len(self.rows) > stored:
                results.append(self.path, self.rows[stored:])

    def _measure(self, spec: StepSpec, seconds: float) -> StepCase:
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        case = spec.case()
        once = sum(lap.wall for lap in case.time())
        (times,) = interleave([Verified(case, {}, once)], seconds, least=3, most=10)
        metric = "gpu time" if self.device == "cuda" else "wall time"
        for stage, name in (("fwd", "fwd"), ("bwd", "bwd"), ("optimizer", "optimizer"), ("total", "step")):
            self.add(spec, name, metric, "ms", times.summary(stage, "wall"))
        total = times.summary("total", "wall")
        tokens = 1e3 * spec.batch * spec.seqlen
        rate = Summary(tokens / total.median, tokens / total.p80, tokens / total.p20)
        self.add(spec, "step", "throughput", "tokens/s", rate)
        text = f"{total.median:10.1f} ms {rate.median:12,.0f} tokens/s"
        if self.device == "cuda":
            peak = (case.peak() - before) / 2**20
            self.add(spec, "step", "peak memory", "MiB", peak)
            text += f" {peak:10,.0f} MiB"
        print(f"  {spec.batch} x {spec.seqlen}  {spec.backend:12}  {spec.variant:24}{text}", flush=True)
        case.free()
        return case


def run_on_gpu(quick: bool, csv: Path | None, device: str, minutes: float) -> int:
    """The benchmark of a GPU; on the CPU, to prove that it runs, with `quick`."""
    environment = results.environment(device)
    print(environment)
    path = csv or (None if quick else default_file(environment.device))
    session = GpuSession(environment, device, path, time.monotonic() + 60 * minutes)
    for group in gpu_groups(device, quick):
        session.measure(group, 0.1 if quick else 3.0)
    print(f"{len(session.rows)} rows{f' appended to {path}' if path else ''}\n  next: python -m benchmarks.tables")
    return 1 if session.wrong else 0


def run(
    quick: bool = False, csv: Path | None = None, backend: str = "cpu", device: str = "cpu", minutes: float = 2.5
) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: two narrow layers, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        backend: of the patched model on the CPU; a GPU takes the best for each operator.
        device: cpu or cuda.
        minutes: after which nothing new is started on a GPU.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    from ssmtune.ops import available_backends

    if device == "cuda":
        return run_on_gpu(quick, csv, device, minutes)
    reason = available_backends("selective_scan")[backend]
    if reason is not None:
        print(f"error: backend {backend!r} cannot be measured: {reason}", file=sys.stderr)
        return 1
    environment = results.environment()
    threads = min(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    print(environment, f"{threads} threads", sep=" · ")
    session = Session(environment, threads)
    planned = groups(backend, quick)
    try:
        for pair in {(spec.backend, spec.method): spec for group in planned for spec in group}.values():
            if pair.backend != "gemm":
                verify_small(pair)
        print("time of forward and backward")
        for group in planned:
            session.measure(group, 0.3 if quick else 8.0)
        print("peak memory above the model")
        for group in planned:
            session.memory(group)
    except Disagreement as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    store(environment, session.rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two narrow layers, 1 x 64; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    parser.add_argument("--backend", default="cpu", choices=OURS, help="of the patched model on the CPU (default: cpu)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=2.5, help="on a GPU, start nothing new after them")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

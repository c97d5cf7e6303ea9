"""Times a whole training step of a Mamba, forward and backward, against other ways to train it.

`python -m benchmarks.training_step` measures the shapes of Mamba-130m (24 layers, width 768; 1024 tokens of vocabulary)
and of the model in the package (8 layers, width 256), and appends its rows to benchmarks/results/<device>.csv; with
--quick it takes two narrow layers and stores nothing. benchmarks.gpu_training is that of a GPU.
"""

import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peak_memory import peak_memory
from benchmarks.step_cases import StepSpec, check_losses, memory_probe, verify_small
from benchmarks.stored import command_line, store
from benchmarks.worker import KEPT, Workers
from ssmtune.measure import results
from ssmtune.measure.specs import OURS
from ssmtune.measure.timing import Disagreement, Summary, Verified, interleave

OP = "training_step"
METHODS = ("full", "state-offset", "lora")


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


def run(quick: bool = False, csv: Path | None = None, backend: str = "cpu") -> int:
    """Measure, print, and append to a file.

    Args:
        quick: two narrow layers, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        backend: of the patched model.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    from ssmtune.ops import available_backends

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
    parser = command_line("training_step", __doc__, quick="two narrow layers, 1 x 64")
    parser.add_argument("--backend", default="cpu", choices=OURS, help="of the patched model (default: cpu)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

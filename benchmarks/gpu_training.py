"""Times a whole training step on a GPU: forward, backward and AdamW, in bfloat16.

`python -m benchmarks.gpu_training` takes models of the shape of Mamba-130m and Mamba-1.4b on 8 x 2048 tokens, tuned
by each method, against transformers on mamba_ssm's kernels and the state methods as their authors released them. It
appends its rows to benchmarks/results/<device>.csv as they come, and starts nothing new after `--minutes`.
`--device cpu --quick` runs all of it on two narrow layers.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.authors_scan import SCANS
from benchmarks.step_cases import StepCase, StepSpec, check_losses, forget_models, verify_small
from benchmarks.stored import command_line, default_file
from benchmarks.training_step import Session
from ssmtune.measure import results
from ssmtune.measure.peers import mamba_ssm_scan
from ssmtune.measure.timing import GPU_FACTOR, Summary, Verified, interleave, laps

METHODS = ("state-offset", "initial-state", "lora", "full")
MODELS = {"Mamba-130m": (24, 768), "Mamba-1.4b": (48, 2048)}
"""Layers and width."""

UNVERIFIED = (*(("authors", method) for method in SCANS), ("transformers", "lora"))
"""The authors' scans are held to ours by a test; the fused block of mamba_ssm leaves LoRA on x_proj and dt_proj out."""


def groups(device: str, quick: bool) -> list[list[StepSpec]]:
    """What is measured of each model on a GPU, one step after the other."""
    upstream = [("transformers", "full"), ("transformers", "lora")] if mamba_ssm_scan.why_not() is None else []
    ways = [*(("ssmtune", method) for method in METHODS), *upstream]
    ways += [("authors", method) for method in SCANS]
    common = {"dtype": "bfloat16", "device": device, "optimizer": True}
    if quick:
        return [[StepSpec(*way, 2, 16, 2, 32, 64, 4, **common) for way in ways]]
    return [
        [StepSpec(*way, 8, 2048, layers, width, 50_280, **common) for way in ways] for layers, width in MODELS.values()
    ]


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
                if (spec.backend, spec.method) not in UNVERIFIED:
                    verify_small(spec, GPU_FACTOR if self.device == "cuda" else 1)
                case = self._measure(spec, seconds)
                check_losses([first or case, case])
                first = first or case
            except torch.OutOfMemoryError:
                self.add(spec, "step", "out of memory", "1", 1.0)
                print(f"  {spec.label}: out of memory", flush=True)
            except Exception as failure:  # a wrong result, or a kernel that does not start: the rest goes on
                del self.rows[stored:]
                self.wrong.append(spec)
                print(f"error: {spec.label}: {type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
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


def run(quick: bool = False, csv: Path | None = None, device: str = "cuda", minutes: float = 2.0) -> int:
    """Measure, print, and append to a file as it goes.

    Args:
        quick: two narrow layers, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        device: cuda, or cpu to prove that all of this runs.
        minutes: after which nothing new is started.

    Returns:
        0 when every step was right and timed, 1 otherwise.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: no GPU found (torch {torch.__version__}).\n  Add --device cpu --quick.", file=sys.stderr)
        return 1
    environment = results.environment(device)
    print(environment)
    path = csv or (None if quick else default_file(environment.device))
    session = GpuSession(environment, device, path, time.monotonic() + 60 * minutes)
    for group in groups(device, quick):
        session.measure(group, 0.1 if quick else 3.0)
    print(f"{len(session.rows)} rows{f' appended to {path}' if path else ''}\n  next: python -m benchmarks.tables")
    return 1 if session.wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("gpu_training", __doc__, quick="two narrow layers")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=2.0, help="start nothing new after them (default: 2)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""What a mixer keeps of its forward pass for its backward pass, and what it costs to keep less.

`python -m benchmarks.activation_memory` counts a mixer of Mamba-130m under several methods of fine-tuning: patched
mixers and transformers' plain path by the tensors that autograd saves, mamba_ssm, which takes a GPU, by the shapes of
what its source saves. Then it times training steps that make more and less of it again, in turns. It appends its rows
to benchmarks/results/<device>.csv; with --quick it takes a narrow model and stores nothing.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.step_cases import StepCase, StepSpec, build, check_losses
from benchmarks.stored import command_line, store
from ssmtune.measure import results
from ssmtune.measure.timing import Lap, Verified, interleave
from ssmtune.mixers import find_mixers, patch

OP = "activation_memory"
METHODS = ("full", "lora", "state-offset", "initial-state")
ALL_KEPT, DEFAULT, SCAN_TOO = "ssmtune, recompute nothing", "ssmtune, cheap", "ssmtune, scan"
RECOMPUTE = {ALL_KEPT: "nothing", DEFAULT: "cheap", SCAN_TOO: "scan"}
TRANSFORMERS, UNFUSED, FUSED = "transformers", "mamba_ssm, scan", "mamba_ssm, fused block"


def kept_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd saves during a forward pass, each piece of memory once and no parameters."""
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        result = run()
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def hidden_states(spec: StepSpec) -> Tensor:
    """What a mixer of that spec gets, with layers below it that train."""
    return torch.randn(spec.batch, spec.seqlen, spec.width, dtype=getattr(torch, spec.dtype)).requires_grad_()


def ours(spec: StepSpec, name: str) -> int:
    """What a patched mixer keeps."""
    model = build(spec, getattr(torch, spec.dtype))
    mixer = find_mixers(model)[-1][1]
    patch(model, recompute=RECOMPUTE[name])
    return kept_bytes(mixer, lambda: mixer(hidden_states(spec)))


def theirs(spec: StepSpec) -> dict[str, int]:
    """What a mixer of transformers keeps: on the path of plain PyTorch, and with mamba_ssm beside it.

    mamba_ssm's functions keep what their source saves (`ops/selective_scan_interface.py`), counted here by its
    shapes; the projections, which are modules of transformers, are asked. With a state offset or an initial state none
    of them runs: then it is what they keep without, of a mixer that is frozen.
    """
    trained = spec.method in ("full", "lora")
    method, dtype = spec.method if trained else "full", getattr(torch, spec.dtype)
    mixer = find_mixers(build(replace(spec, backend="transformers", method=method), dtype))[-1][1]
    if not trained:
        mixer = copy.deepcopy(mixer).requires_grad_(False)
    rows, dim, rank = spec.batch * spec.seqlen, mixer.intermediate_size, mixer.time_step_rank

    def projection(module: nn.Module, features: int) -> int:
        x = torch.randn(rows, features, dtype=dtype).requires_grad_()
        return kept_bytes(module, lambda: module(x))

    one = rows * dim * dtype.itemsize
    convolved = rows * (rank + 2 * spec.dstate) * dtype.itemsize
    B_and_C = 2 * rows * spec.dstate * dtype.itemsize
    states = spec.batch * dim * ceil(spec.seqlen / 2048) * 2 * spec.dstate * 4
    A = dim * spec.dstate * 4 * (2 if spec.method == "full" else 1)  # itself, and for the gradient of its logarithm
    before = projection(mixer.in_proj, spec.width)
    # x and z in one; the output before the gate
    fused = before + 2 * one + one + convolved + B_and_C + states + A
    # x; copies of u, delta and z along time; the output before the gate
    scan = before + 2 * one + 3 * one + one + B_and_C + states + A
    scan += (
        projection(mixer.x_proj, dim) + projection(mixer.out_proj, dim) + (convolved if spec.method == "full" else 0)
    )
    return {TRANSFORMERS: kept_bytes(mixer, lambda: mixer(hidden_states(spec))), UNFUSED: scan, FUSED: fused}


class Case(StepCase):
    """A training step that recomputes as much as its name says."""

    def __init__(self, spec: StepSpec, name: str):
        super().__init__(spec)
        self.name = name

    def time(self) -> list[Lap]:
        patch(self.model, recompute=RECOMPUTE[self.name])
        return super().time()


def count(spec: StepSpec) -> dict[str, int]:
    """What each implementation keeps, in bytes."""
    return theirs(spec) | {name: ours(spec, name) for name in (ALL_KEPT, DEFAULT, SCAN_TOO)}


def run(quick: bool = False, csv: Path | None = None) -> int:
    """Count, time, print, and append to a file.

    Args:
        quick: a narrow model, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.

    Returns:
        0.
    """
    environment, rows = results.environment(), []
    threads = torch.get_num_threads()

    def add(spec: StepSpec, backend: str, metric: str, unit: str, value: Any) -> None:
        variant = spec.variant if metric == "cpu time" else spec.method
        sizes = {"batch": spec.batch, "dim": spec.width, "seqlen": spec.seqlen, "dstate": spec.dstate}
        columns = {"op": OP, "pass_": "fwdbwd", "backend": backend, "dtype": spec.dtype, "threads": threads}
        rows.append(environment.row(value, **columns, **sizes, variant=variant, metric=metric, unit=unit))

    mixer = StepSpec("cpu", "full", 1, 64, layers=1, width=64) if quick else StepSpec("cpu", "full", 1, 512, layers=1)
    for dtype in ("float32", "bfloat16"):
        for method in METHODS:
            spec = replace(mixer, method=method, dtype=dtype)
            one = spec.batch * spec.seqlen * 2 * spec.width * getattr(torch, dtype).itemsize
            print(f"{dtype}, {method}, in (batch, seqlen, {2 * spec.width}) tensors")
            for name, kept in count(spec).items():
                print(f"  {name:28}{kept / one:8.2f}", flush=True)
                add(spec, name, "kept", "MiB", kept / 2**20)
    steps = [replace(mixer, layers=2)]
    if not quick:
        steps = [StepSpec("cpu", "full", 1, 512, layers=4), StepSpec("cpu", "full", 4, 256, 8, 256)]
    for step in steps:
        for method in METHODS[:3]:
            cases = [Case(replace(step, method=method), name) for name in (ALL_KEPT, DEFAULT, SCAN_TOO)]
            verified = [Verified(case, {}, sum(lap.wall for lap in case.time())) for case in cases]
            times = interleave(verified, 0.1 if quick else 12.0, least=2 if quick else 12)
            check_losses(cases)
            first = times[0].summary("total", "cpu").median
            for case, sample in zip(cases, times, strict=True):
                summary = sample.summary("total", "cpu")
                add(case.spec, case.name, "cpu time", "ms", summary)
                against = f"{summary.median / first:.3f}x, n = {len(sample.runs)}"
                print(
                    f"  {case.spec.width} wide, {case.spec.variant:24}{case.name:28}{summary.median:8.1f} ms  {against}"
                )
    store(environment, rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    return run(**vars(command_line("activation_memory", __doc__, quick="a narrow model").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

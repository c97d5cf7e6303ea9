"""Times ssmtune.causal_conv1d with silu against torch's convolution on the same channels-last view.

`python -m benchmarks.causal_conv1d` appends its rows to benchmarks/results/<device>.csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.call_cases import CallCase
from benchmarks.measure import Disagreement, Verified, interleave, tolerances, verify
from benchmarks.shapes import MAIN, QUICK, Shape
from ssmtune.ops import causal_conv1d

OP = "causal_conv1d"
WIDTH = 4


def cases(
    shape: Shape, backward: bool, dtype: torch.dtype = torch.float32, values: torch.dtype = torch.float32
) -> dict[str, CallCase]:
    """The convolution by each implementation, on x as a model has it: half of what a projection makes.

    Args:
        dtype: that it is computed in.
        values: the type that the inputs are rounded to first, so that two dtypes can have the same ones.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(values).to(dtype)

    projected = random(shape.batch, shape.seqlen, 2 * shape.dim)
    x = projected[..., : shape.dim].transpose(1, 2).requires_grad_(backward)
    weight, bias = random(shape.dim, WIDTH).requires_grad_(backward), random(shape.dim).requires_grad_(backward)
    dout = random(shape.batch, shape.seqlen, shape.dim).transpose(1, 2)

    def torch_conv() -> Tensor:
        out = F.conv1d(x, weight.unsqueeze(1), bias, padding=WIDTH - 1, groups=shape.dim)
        return F.silu(out[..., : shape.seqlen])

    calls = {"cpu": lambda: causal_conv1d(x, weight, bias, activation="silu"), "torch": torch_conv}
    wanted = {"x": x, "weight": weight, "bias": bias} if backward else {}
    return {name: CallCase(f"{name} {OP} of {shape}", call, wanted, dout) for name, call in calls.items()}


def run(quick: bool = False, csv: Path | None = None) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: one small shape, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    environment = results.environment()
    print(environment)
    rows: list[results.Row] = []
    try:
        for shape in QUICK if quick else MAIN:
            for backward in (False, True):
                verified = [*_verified(shape, backward, torch.float32), _verified(shape, backward, torch.bfloat16)[0]]
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    _time(rows, environment, shape, backward, threads, verified, 0.2 if quick else 2.0)
    except Disagreement as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    results.store(environment, rows, quick, csv)
    return 0


def _verified(shape: Shape, backward: bool, dtype: torch.dtype) -> list[Verified]:
    right, _ = cases(shape, backward, torch.float64, dtype)["torch"].values()
    return [verify(case, right, None, *tolerances(dtype)) for case in cases(shape, backward, dtype, dtype).values()]


def _time(rows, environment, shape: Shape, backward: bool, threads: int, verified, seconds: float) -> None:
    for entry, sample in zip(verified, interleave(verified, seconds), strict=True):
        backend, direction = entry.case.label.partition(" ")[0], "fwdbwd" if backward else "fwd"
        dtype = str(entry.case.gradient.dtype).removeprefix("torch.")
        variant = "silu" if dtype == "float32" else f"silu {dtype}"
        for clock in ("cpu", "wall"):
            time = sample.summary("total", clock)
            rows.append(
                environment.row(
                    time, op=OP, pass_=direction, backend=backend, dtype=dtype, batch=shape.batch, dim=shape.dim,
                    seqlen=shape.seqlen, dstate=0, threads=threads, variant=variant, metric=f"{clock} time", unit="ms",
                )
            )  # fmt: skip
        print(f"  {direction:8}{shape!s:18}{threads}  {backend:8}{variant:16}{time.median:10.2f} ms", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.causal_conv1d", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

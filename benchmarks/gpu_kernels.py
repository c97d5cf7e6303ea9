"""Times the kernels of a GPU: the scan and the convolution on every backend, against other implementations.

`python -m benchmarks.gpu_kernels` needs about 4 minutes. It measures what matters most first, appends its rows to
benchmarks/results/<device>.csv as they come, and starts nothing new after `--minutes`. `--device cpu --quick` runs all
of it on small shapes and the kernels of the CPU.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.stored import command_line, default_file
from ssmtune.measure import bounds, results
from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.inputs import Shape
from ssmtune.measure.peers import usable
from ssmtune.measure.plans import scan_peers
from ssmtune.measure.scan_cases import ScanSpec
from ssmtune.measure.session import Session
from ssmtune.measure.specs import Spec, available

TRAINING = Shape(8, 4096, 2048)
"""A layer of Mamba-1.4b in training."""

LONG = Shape(1, 1536, 16_384)
"""A layer of Mamba-130m on one long text: too few channels to fill a GPU with one thread for each."""

LENGTHS = tuple(Shape(1, 1536, 2**power) for power in range(9, 17))
BATCHES = tuple(Shape(8, 4096, seqlen) for seqlen in (512, 4096, 8192))
OTHERS = (
    Shape(16, 1536, 512), Shape(16, 1536, 2048), Shape(1, 4096, 2048), Shape(1, 4096, 16_384), Shape(1, 8192, 2048),
    Shape(4, 8192, 2048), Shape(16, 8192, 1024),
)  # fmt: skip
FLOAT32 = (TRAINING, LONG, Shape(1, 1536, 2048), Shape(16, 1536, 512))
LOOP = Shape(1, 1536, 512)
"""Short enough for transformers' PyTorch loop."""

VARIANTS = ("state-offset", "initial-state", "full", "channels-first")
HALF = ("bfloat16",)


def scans(
    shape: Shape, device: str, half: tuple[str, ...] = HALF, variants: Sequence[str] = (), directions=("fwd", "fwdbwd")
) -> list[Spec]:
    """A scan on every backend, plain and with variants, and by every peer."""
    specs: list[Spec] = []
    for direction in directions:
        for name in available("selective_scan", device):
            tags = [half, *((*half, variant) for variant in variants)]
            specs += [ScanSpec(shape, direction, name, each, device) for each in tags]
        specs += scan_peers(shape, direction, device, half)
    return specs


def convolutions(shape: Shape, device: str) -> list[Spec]:
    """A convolution on every backend and by torch."""
    names = (*available("causal_conv1d", device), "torch")
    ways = [(direction, name) for direction in ("fwd", "fwdbwd") for name in names]
    return [ConvSpec(shape, *way, ("silu", *HALF), device) for way in ways]


def groups(device: str, quick: bool) -> list[list[Spec]]:
    """What is timed in turns with what, the most important first."""
    if quick:
        small = Shape(2, 24, 48)
        lengths = (scans(Shape(1, 16, seqlen), device) for seqlen in (16, 32, 64))
        return [scans(small, device, HALF, VARIANTS), convolutions(small, device), *lengths]
    planned = [scans(TRAINING, device, HALF, VARIANTS), scans(LONG, device, HALF, VARIANTS[:1])]
    planned += [convolutions(TRAINING, device), convolutions(LONG, device)]
    planned += [scans(shape, device) for shape in (*LENGTHS, *BATCHES) if shape != LONG]
    planned += [scans(shape, device, ()) for shape in FLOAT32]
    planned += [scans(shape, device) for shape in OTHERS]
    return [*planned, scans(LOOP, device, ())]


def run(quick: bool = False, csv: Path | None = None, device: str = "cuda", minutes: float = 4.0) -> int:
    """Measure, print, and append to a file as it goes.

    Args:
        quick: small shapes, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        device: cuda, or cpu to prove that all of this runs.
        minutes: after which nothing new is started.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: no GPU found (torch {torch.__version__}).\n  Add --device cpu --quick.", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * minutes
    environment = results.environment(device)
    limits = bounds.measure(device)
    print(environment, limits, sep=" · ")
    for name, reason in usable(device)[1].items():
        print(f"  left out: {name}: {reason}")
    path = csv or (None if quick else default_file(environment.device))
    session = Session(environment, device, 0.02 if quick else 0.15, path=path, deadline=deadline, limits=limits)
    keep_limits(session)
    planned = groups(device, quick)
    for done, group in enumerate(planned):
        print(f"{done + 1}/{len(planned)}")
        session.measure(group, most=15)
        if device == "cuda" and any(spec.shape in (TRAINING, LONG) for spec in group):
            session.peaks([spec for spec in group if spec.op == "selective_scan" and spec.tags[-1:] == HALF])
    if session.left_out:
        print(f"{len(session.left_out)} cases were left out: {minutes:g} minutes are over")
    print(f"{len(session.rows)} rows{f' appended to {path}' if path else ''}\n  next: python -m benchmarks.tables")
    return 1 if session.wrong else 0


def keep_limits(session: Session) -> None:
    """The limits of the machine as rows of their own."""
    limits, device = session.limits, session.device
    found = {"copy": (limits.bandwidth / 1e9, "GB/s"), limits.unit: (limits.rate and limits.rate / 1e9, "G/s")}
    for name, (value, unit) in found.items():
        if value is not None:
            nothing = ScanSpec(Shape(0, 0, 0, 0), "fwd", name, (), device)
            session.add(nothing, max(session.threads), "limit", unit, value)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("gpu_kernels", __doc__, quick="small shapes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=4.0, help="start nothing new after them (default: 4)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

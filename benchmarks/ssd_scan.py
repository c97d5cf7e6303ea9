"""Time Mamba-2's scan on the CPU beside that of transformers, forward and backward.

Each is checked against float64 first; then they take turns, so that a busy machine is busy for all of them. The ratios
are medians over rounds, in which each ran once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import ssmtune
from benchmarks.stored import command_line, store
from ssmtune.measure import results
from ssmtune.measure.timing import Summary, error, laps

OP = "ssd_scan"
TOLERANCE = 2e-4
"""Largest relative error of a result or a gradient; transformers' sums of decays are in float32."""
PEERS = {"transformers, chunks of 256": 256, "transformers, chunks of 64": 64}


@dataclass(frozen=True)
class Sizes:
    """Of a scan: one group, as in the models of Mamba-2's authors."""

    batch: int = 1
    seqlen: int = 512
    heads: int = 24
    headdim: int = 64
    dstate: int = 128


def inputs(sizes: Sizes) -> dict[str, Tensor]:
    """Tensors like those of a trained layer."""
    torch.manual_seed(0)
    sequence = sizes.batch, sizes.seqlen
    tensors = {
        "x": torch.randn(*sequence, sizes.heads, sizes.headdim),
        "dt": torch.randn(*sequence, sizes.heads) - 3,
        "A": -torch.arange(1.0, sizes.heads + 1),
        "B": torch.randn(*sequence, 1, sizes.dstate),
        "C": torch.randn(*sequence, 1, sizes.dstate),
        "D": torch.ones(sizes.heads),
        "dt_bias": torch.zeros(sizes.heads),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def transformers_scan(chunk_size: int) -> Callable[..., Tensor]:
    """The scan of transformers in chunks of one size."""

    def scan(x, dt, A, B, C, **kwargs):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, **kwargs)

    return scan


def stages(scan: Callable[..., Tensor], tensors: dict[str, Tensor], weight: Tensor, kept: list[Tensor]):
    """The forward pass, then the backward pass; `kept` gets the results."""
    out = scan(**tensors, dt_softplus=True)
    yield
    kept[:] = out.detach(), *torch.autograd.grad((out * weight).sum(), list(tensors.values()))
    yield


def run(quick: bool = False, csv: Path | None = None, rounds: int = 15) -> int:
    """Check, time, print, and append to a file.

    Args:
        quick: a small scan, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        rounds: how often each runs.

    Returns:
        0.
    """
    sizes = Sizes(seqlen=64, heads=2, headdim=16, dstate=16) if quick else Sizes()
    tensors = inputs(sizes)
    weight = torch.randn_like(tensors["x"])
    scans = {"cpu": ssmtune.ssd_scan} | {name: transformers_scan(size) for name, size in PEERS.items()}

    expected: list[Tensor] = []
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    list(stages(ssmtune.ssd_scan, wide, weight.double(), expected))
    for name, scan in scans.items():
        actual: list[Tensor] = []
        list(stages(scan, tensors, weight, actual))
        for result, a, b in zip(("out", *tensors), expected, actual, strict=True):
            if not error(a, b) <= TOLERANCE:
                raise RuntimeError(f"{name}: {result} is {error(a, b):.1e} away from its float64 value; not timed.")

    samples = {name: [] for name in scans}
    for _ in range(2 if quick else rounds):
        for name, scan in scans.items():
            samples[name].append([lap.wall for lap in laps(stages(scan, tensors, weight, []))])

    environment, rows = results.environment(), []
    columns = {"op": OP, "dtype": "float32", "batch": sizes.batch, "dim": sizes.heads * sizes.headdim}
    columns |= {
        "seqlen": sizes.seqlen,
        "dstate": sizes.dstate,
        "threads": torch.get_num_threads(),
        "variant": "default",
    }
    for name, sample in samples.items():
        line = f"{name:28}"
        for pass_, pick in (("fwd", lambda run: run[0]), ("fwdbwd", sum)):
            summary = Summary.of([1e3 * pick(run) for run in sample])
            ratio = median(pick(run) / pick(own) for run, own in zip(sample, samples["cpu"], strict=True))
            line += f"{pass_:>8}{summary.median:9.1f} ms{ratio:7.1f}x"
            for metric, unit, value in (("wall time", "ms", summary), ("ratio to cpu", "1", ratio)):
                rows.append(environment.row(value, pass_=pass_, backend=name, metric=metric, unit=unit, **columns))
        print(line, flush=True)
    store(environment, rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("ssd_scan", __doc__, quick="a small scan")
    parser.add_argument("--rounds", type=int, default=15, help="how often each runs")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

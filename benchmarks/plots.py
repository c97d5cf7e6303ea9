"""Draws time against seqlen from a CSV file: `python -m benchmarks.plots benchmarks/results/<device>.csv`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.bars import SCAN
from benchmarks.results import Row

TITLES = {"fwd": "forward", "fwdbwd": "forward + backward"}


def draw(path: Path, target: Path) -> None:
    """One panel for each pass: one line for each backend on one thread, with bars from the 20th to the 80th percentile.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: the file has no times of the scan.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plots need matplotlib.\n  pip install matplotlib") from None

    rows = [row for row in results.latest(results.read(path), SCAN) if row.metric == "cpu time" and row.threads == 1]
    if not rows:
        raise ValueError(
            f"{path} has no times of {SCAN} on one thread.\n  Run python -m benchmarks.selective_scan first."
        )
    lines = _lines(rows)
    backends = sorted({row.backend for row in rows})
    dims = sorted({row.dim for row in rows})
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), TITLES, strict=True):
        for (backend, dim), points in lines[direction].items():
            points.sort(key=lambda row: row.seqlen)
            medians = [row.median for row in points]
            spread = [[row.median - row.p20 for row in points], [row.p80 - row.median for row in points]]
            style = {"color": f"C{backends.index(backend)}", "marker": "osD^v"[dims.index(dim) % 5], "capsize": 2}
            label = f"{'ssmtune' if backend in ('cpu', 'reference') else backend}, dim {dim}"
            axes.errorbar([row.seqlen for row in points], medians, spread, label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel="seqlen", title=TITLES[direction])
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if lines[direction]:
            axes.legend(fontsize="small")
    figure.supylabel("CPU time, ms")
    first = rows[0]
    figure.suptitle(
        f"{SCAN}, batch 1, dstate {first.dstate}, {first.dtype}, 1 thread · {first.device} · {first.timestamp[:10]}"
    )
    figure.savefig(target, dpi=150)


def _lines(rows: list[Row]) -> dict[str, dict[tuple[str, int], list[Row]]]:
    lines: dict[str, dict[tuple[str, int], list[Row]]] = {direction: {} for direction in TITLES}
    for row in rows:
        own_layout = row.variant == ("channels-first" if row.backend == "plain C++" else "default")
        if row.batch == 1 and own_layout and row.pass_ in lines:
            lines[row.pass_].setdefault((row.backend, row.dim), []).append(row)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="picture to write (default: beside the CSV file)")
    options = parser.parse_args(argv)
    target = options.out or options.csv.with_suffix(".png")
    try:
        draw(options.csv, target)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

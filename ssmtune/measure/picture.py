"""A picture of time against seqlen, with the bound of the machine as a line."""

from collections.abc import Sequence
from pathlib import Path

from ssmtune.measure.results import Row, time_metric
from ssmtune.measure.table import LEAST, PASSES, extras

OP = "selective_scan"
LEAST_LENGTHS = 3
"""Fewer are no line."""

MOST_PANELS = 3
MARKERS = "osD^v"

Place = tuple[int, int, str, int]  # batch, dim, dtype, threads


def draw(rows: Sequence[Row], target: Path) -> None:
    """One row of panels for each batch and dim that was timed at several lengths, one line for each implementation.

    Bars reach from the 20th to the 80th percentile.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: the scan was not timed at several lengths.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("pictures need matplotlib.\n  pip install matplotlib") from None

    rows = [row for row in rows if row.op == OP and row.pass_ in PASSES and not extras(row)]
    places = _places(rows)
    if not places:
        raise ValueError(
            f"these rows have no times of {OP} at {LEAST_LENGTHS} lengths, so there is nothing to draw.\n"
            "  Measure them first: ssmtune bench, or python -m benchmarks.selective_scan."
        )
    backends = sorted({row.backend for row in rows if row.backend != "bound"})
    figure = Figure(figsize=(10, 1 + 3.5 * len(places)), layout="constrained")
    panels = figure.subplots(len(places), 2, sharey="row", squeeze=False)
    for line, (batch, dim, dtype, threads) in zip(panels, places, strict=True):
        chosen = [row for row in rows if (row.batch, row.dim, row.dtype, row.threads) == (batch, dim, dtype, threads)]
        for axes, direction in zip(line, PASSES, strict=True):
            for backend, points in _lines(chosen, direction, time_metric(threads)).items():
                order = backends.index(backend)
                style = {"color": f"C{order}", "marker": MARKERS[order % len(MARKERS)], "capsize": 2}
                axes.errorbar(*_errorbar(points), label=backend, **style)
            lengths, least = _bound(chosen, direction)
            if lengths:
                axes.plot(lengths, least, "k--", label="bound of the machine")
            axes.set(yscale="log", xlabel="seqlen", title=f"{PASSES[direction]}, batch {batch}, dim {dim}, {dtype}")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize="small")
        line[0].set_ylabel(f"{time_metric(threads)}, ms")
    first = rows[0]
    threads = f", {places[0][3]} threads" if places[0][3] else ""
    figure.suptitle(f"{OP}, dstate {first.dstate}{threads} · {first.device} · {first.timestamp[:10]}")
    figure.savefig(target, dpi=150)


def _places(rows: Sequence[Row]) -> list[Place]:
    lengths: dict[Place, set[int]] = {}
    for row in rows:
        if row.metric == time_metric(row.threads):
            lengths.setdefault((row.batch, row.dim, row.dtype, row.threads), set()).add(row.seqlen)
    found = [place for place, timed in lengths.items() if len(timed) >= LEAST_LENGTHS]
    return sorted(found, key=lambda place: -len(lengths[place]))[:MOST_PANELS]


def _lines(rows: Sequence[Row], direction: str, metric: str) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seqlen):
        if (row.pass_, row.metric) == (direction, metric):
            lines.setdefault(row.backend, []).append(row)
    return lines


def _errorbar(points: Sequence[Row]) -> tuple[list[int], list[float], list[list[float]]]:
    spread = [[row.median - row.p20 for row in points], [row.p80 - row.median for row in points]]
    return [row.seqlen for row in points], [row.median for row in points], spread


def _bound(rows: Sequence[Row], direction: str) -> tuple[list[int], list[float]]:
    """The larger of the bounds at each length."""
    largest: dict[int, float] = {}
    for row in rows:
        if row.pass_ == direction and row.metric.startswith(LEAST):
            largest[row.seqlen] = max(row.median, largest.get(row.seqlen, 0))
    return sorted(largest), [largest[length] for length in sorted(largest)]

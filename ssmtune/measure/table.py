"""Tables of measured times: ssmtune beside its peers, with ratios and the bound of the machine."""

from collections.abc import Iterable, Sequence

from ssmtune.measure.peers import PEERS
from ssmtune.measure.results import Row, time_metric
from ssmtune.measure.specs import HALVES, OURS

PASSES = {"fwd": "forward", "fwdbwd": "forward + backward"}
LEAST = "least time by "


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def extras(row: Row) -> str:
    """What a row's case had beyond its dtype and the layout that suits its implementation best."""
    own = {"default", "silu", *HALVES, *(PEERS[row.backend].tags if row.backend in PEERS else ())}
    return " ".join(tag for tag in row.variant.split() if tag not in own)


def comparison(rows: Iterable[Row], op: str) -> tuple[list[str], list[list[str]]]:
    """Times of an operator, one line for each call and one column for each implementation.

    Behind a peer's time is how many times the best of ssmtune's it is, behind the least time that the machine
    allows how many times that ssmtune takes.

    Returns:
        The header and the body.
    """
    places: dict[tuple, dict[str, float]] = {}
    unit = "ms"
    rows = [row for row in rows if row.op == op and row.pass_ in PASSES]
    for row in rows:
        place = (row.pass_, row.batch, row.dim, row.seqlen, row.dtype, row.threads, extras(row))
        if row.metric == time_metric(row.threads):
            places.setdefault(place, {})[row.backend] = row.median
            unit = row.unit
        elif row.metric.startswith(LEAST):
            cells = places.setdefault(place, {})
            least = {"ms": 1, "us": 1e3}[unit] * row.median
            if least > cells.get("bound", 0):
                cells["bound"] = least
                cells["by"] = row.metric.removeprefix(LEAST)
    measured = {name for cells in places.values() for name in cells} - {"bound", "by"}
    ours = [name for name in OURS if name in measured]
    peers = [name for name in measured if name not in OURS]
    peers.sort(key=lambda name: [*PEERS, name].index(name))
    body = []
    for (direction, batch, dim, seqlen, dtype, threads, extra), cells in places.items():
        if not measured.intersection(cells):
            continue
        best = min((cells[name] for name in ours if name in cells), default=None)
        line = [PASSES[direction], f"({batch}, {dim}, {seqlen})", dtype, str(threads or ""), extra]
        line += [number(cells.get(name)) for name in ours]
        line += [_with_ratio(cells.get(name), best) for name in peers]
        bound = cells.get("bound")
        line.append(f"{number(bound)} {cells['by']} ({best / bound:.2f}x)" if bound and best else "")
        body.append(line)
    header = ["pass", "batch, dim, seqlen", "dtype", "threads", "with", *ours, *peers, f"least, {unit}"]
    filled = [column for column in range(len(header)) if column < 2 or any(line[column] for line in body)]
    return [header[column] for column in filled], [[line[column] for column in filled] for line in body]


def _with_ratio(value: float | None, ours: float | None) -> str:
    if value is None:
        return ""
    return f"{number(value)} ({number(value / ours)}x)" if ours else number(value)


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: text to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    right = [any(line[column][:1].isdigit() for line in body) for column in range(len(header))]
    lines = []
    for line in (header, *body):
        cells = zip(line, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in cells))
    return "\n".join(line.rstrip() for line in lines)

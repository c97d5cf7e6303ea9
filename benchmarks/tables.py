"""Writes the tables of benchmarks/README.md from benchmarks/results/*.csv: `python -m benchmarks.tables`."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import instruction_counts
from benchmarks.bars import CONV, DECODING, OPS, SCAN, STEP, UPDATE, Bar, Run, Sizes, judge
from benchmarks.stored import FOLDER
from ssmtune.measure import results
from ssmtune.measure.peers import PEERS
from ssmtune.measure.results import Row
from ssmtune.measure.table import PASSES, comparison, number

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table: text to the left, numbers to the right."""
    body = list(body)
    numeric = [all(not row[i] or row[i].lstrip("<>= ")[:1].isdigit() for row in body) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body)) + "\n"


def bar_table(rows: Iterable[Row]) -> str:
    """Every ratio of the device with its bar; on a CPU for both allocators. A bar that is missed says so."""
    rows = list(rows)
    gpu = any(row.threads == 0 for row in rows)
    usual = [(bar, ratios) for bar, ratios in judge(rows) if bar.gpu == gpu or ratios]
    if gpu:
        return markdown(("ratio", "bar", "measured"), ((bar.title, bar.limit(), _verdict(bar, r)) for bar, r in usual))
    kept = {bar.title: ratios for bar, ratios in judge(rows, kept=True)}
    body = [(bar.title, bar.limit(), _verdict(bar, found), _verdict(bar, kept[bar.title])) for bar, found in usual]
    return markdown(("ratio", "bar", "allocator as it comes", "memory kept"), body)


def _verdict(bar: Bar, ratios: list[float]) -> str:
    if not ratios:
        return ""
    low, high = (f"{value:.3g}" for value in (min(ratios), max(ratios)))
    spread = low if low == high else f"{low} to {high}"
    if not bar.limit():
        return spread
    return f"{spread}, holds" if bar.holds(ratios) else f"**{spread}, missed**"


def scan_table(run: Run, ours: str) -> str:
    """Milliseconds of the scan at each shape, ssmtune and every peer."""
    peers = [peer for peer in PEERS if run.settings(peer)]
    body = []
    for direction, title in (("fwd", "forward"), ("fwdbwd", "forward + backward")):
        for sizes, threads in _main_places(run, ours):
            times = [run.time(direction, ours, sizes, threads)]
            for peer in peers:
                variant = " ".join(PEERS[peer].tags) or "default"
                times.append(run.time(direction, peer, sizes, threads, variant))
            body.append((title, str(sizes), str(threads), *map(number, times)))
    return markdown(("pass", "batch, dim, seqlen", "threads", "ssmtune", *peers), body)


def variant_table(run: Run, ours: str) -> str:
    """Milliseconds of ssmtune's scan with other layouts, state inputs and gradients."""
    order = dict.fromkeys(row.variant for row in run.rows if row.backend == ours and "time" in row.metric)
    body = []
    for variant in order:
        for direction, title in (("fwd", "forward"), ("bwd", "backward"), ("fwdbwd", "forward + backward")):
            times = [run.time(direction, ours, *place, variant) for place in _main_places(run, ours)]
            if any(times):
                body.append((variant, title, *map(number, times)))
    header = [f"{sizes}, {threads} thr." for sizes, threads in _main_places(run, ours)]
    return markdown(("variant", "pass", *header), body)


def _main_places(run: Run, ours: str) -> list[tuple[Sizes, int]]:
    return [place for place in run.settings(ours) if run.time("fwdbwd", ours, *place, "full") is not None]


def quadratic_table(run: Run, ours: str) -> str:
    """Forward + backward where transformers' own scan was timed in training."""
    places = [place for place in run.settings("transformers") if run.time("fwdbwd", "transformers", *place)]
    names = (ours, "unbind loop", "transformers")
    return markdown(
        ("batch, dim, seqlen", "ssmtune", *names[1:]),
        ((str(place[0]), *(number(run.time("fwdbwd", name, *place)) for name in names)) for place in places),
    )


def length_table(run: Run, ours: str) -> str:
    """Time of one step against seqlen, on one thread."""
    body = []
    for sizes, threads in run.settings(ours):
        if sizes[:2] == (1, 1536) and threads == 1:
            times = [run.time(direction, ours, sizes, 1) for direction in ("fwd", "fwdbwd")]
            body.append((f"{sizes[2]:,}", *("" if time is None else f"{1e3 * time / sizes[2]:.2f}" for time in times)))
    return markdown(("seqlen", "forward", "forward + backward"), body)


def memory_table(run: Run) -> str:
    """Peak memory of a scan, in tensors."""
    names = {"fwd": "forward", "fwdbwd": "forward + backward"}
    return markdown(
        ("backend", "pass", "gradients", "peak, tensors"),
        (
            (
                row.backend,
                names[row.pass_],
                "" if row.pass_ == "fwd" else row.variant.replace("default", "frozen"),
                number(row.median),
            )
            for row in run.rows
            if row.metric == "peak memory"
        ),
    )


def step_table(run: Run) -> str:
    """Seconds and memory of a training step."""
    body = []
    for row in run.rows:
        if (row.metric, row.pass_) == ("wall time", "fwdbwd"):
            sizes = (row.batch, row.dim, row.seqlen)
            forward = run.median("fwd", row.backend, sizes, row.threads, "wall time", row.variant)
            peak = run.median("fwdbwd", row.backend, sizes, row.threads, "peak memory", row.variant)
            name = {"gemm": "matrix products alone", "cpu": "ssmtune"}.get(row.backend, row.backend)
            times = ("" if value is None else f"{value / 1e3:.2f}" for value in (forward, row.median))
            body.append((f"{row.batch} x {row.seqlen}", row.variant, name, *times, number(peak)))
    return markdown(("tokens", "method", "implementation", "forward, s", "step, s", "peak, MiB"), body)


def convolution_table(run: Run) -> str:
    """Milliseconds of the convolution, ssmtune and torch."""
    names = ("cpu", "torch")
    return markdown(
        ("pass", "batch, dim, seqlen", "threads", "ssmtune", "torch"),
        (
            (title, str(sizes), str(threads), *(number(run.time(way, name, sizes, threads, "silu")) for name in names))
            for way, title in (("fwd", "forward"), ("fwdbwd", "forward + backward"))
            for sizes, threads in run.settings(*names)
        ),
    )


def update_table(run: Run) -> str:
    """Microseconds of a decoding step, and the rows that it advances in a second."""
    body = []
    for row in run.rows:
        if row.metric in ("wall time", "gpu time"):
            rate = f"{1e6 * row.batch / row.median:,.0f}"
            body.append((row.variant, row.dtype, f"({row.batch}, {row.dim})", row.backend, number(row.median), rate))
    return markdown(("variant", "dtype", "batch, dim", "implementation", "us", "tokens/s"), body)


def decoding_table(run: Run) -> str:
    """Tokens per second of a model, by each implementation."""
    rows = {(row.variant, row.batch, row.dim): {} for row in run.rows}
    for row in run.rows:
        rows[row.variant, row.batch, row.dim][row.backend] = row.median
    names = ("ssmtune", "transformers")
    return markdown(
        ("what", "batch", "width", *names),
        (
            (variant, str(batch), str(dim), *(number(by.get(name)) for name in names))
            for (variant, batch, dim), by in rows.items()
        ),
    )


def section(path: Path) -> str:
    """All tables of one device."""
    rows = results.read(path)
    text = [f"### {rows[0].device if rows else path.stem}\n", bar_table(rows)]
    for op in OPS:
        measured = results.latest(rows, op)
        if measured:
            first = measured[0]
            text.append(
                f"#### {op}\n\n`python -m benchmarks.{_module(op, measured)}`: {first.device}, torch {first.torch}, "
                f"ssmtune {first.ssmtune} ({first.commit}), {first.timestamp[:10]}\n"
            )
            text += _tables(op, Run(measured), Run(measured, kept=True))
    return "\n".join(text)


def _module(op: str, rows: Sequence[Row]) -> str:
    """Which benchmark measures an operator."""
    if rows[0].threads == 0 and op in (SCAN, CONV, STEP):
        return "gpu_training" if op == STEP else "gpu_kernels"
    return "decoding" if op == UPDATE else op


def _tables(op: str, usual: Run, kept: Run) -> list[str]:
    if op in (SCAN, CONV, STEP) and any(row.threads == 0 for row in usual.rows):
        return _gpu_tables(op, usual)
    ours = next((name for name in ("cuda", "triton", "cpu", "reference") if usual.settings(name)), "cpu")
    if op == STEP:
        title = f"Wall time of forward and backward, {usual.rows[0].threads} threads; memory above the model"
        parts = [(title, step_table(usual)), (f"{title}; memory kept between calls", step_table(kept))]
    elif op == CONV:
        parts = [("Causal convolution of width 4 with silu, ms", convolution_table(usual))]
    elif op == UPDATE:
        parts = [("One step of the recurrence", update_table(usual))]
    elif op == DECODING:
        parts = [("Decoding, tokens per second", decoding_table(usual))]
    else:
        parts = [
            ("Scan, ms", scan_table(usual, ours)),
            ("Scan with memory kept between calls, ms", scan_table(kept, ours)),
            ("ssmtune with other layouts, state inputs and gradients, ms", variant_table(usual, ours)),
            ("The same with memory kept between calls, ms", variant_table(kept, ours)),
            ("transformers' own scan in training, ms", quadratic_table(usual, ours)),
            ("Microseconds for each step of (1, 1536, seqlen), 1 thread", length_table(usual, ours)),
            ("The same with memory kept between calls", length_table(kept, ours)),
            ("Peak memory of a scan above its inputs, in (batch, dim, seqlen) tensors", memory_table(usual)),
        ]
    return [f"{title}:\n\n{table}" for title, table in parts if table.count("\n") > 2]


def _gpu_tables(op: str, run: Run) -> list[str]:
    limits = [f"{row.backend} {number(row.median)} {row.unit}" for row in run.rows if row.metric == "limit"]
    parts = [(f"Limits, measured in this run: {', '.join(limits)}\n", "")] if limits else []
    if op == STEP:
        parts.append(("Forward, backward and AdamW in bfloat16; memory with the model", gpu_step_table(run)))
    else:
        parts.append(("Times on the GPU, ms", markdown(*comparison(run.rows, op))))
        parts.append(("Peak memory of a scan above its inputs, in tensors of its sequences", gpu_memory_table(run)))
    return [f"{title}:\n\n{table}" if table else title for title, table in parts if not table or table.count("\n") > 2]


def gpu_memory_table(run: Run) -> str:
    """Peak memory of each implementation, with what its outputs take."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in run.rows:
        if row.metric == "peak memory":
            place = (PASSES[row.pass_], f"({row.batch}, {row.dim}, {row.seqlen})")
            found.setdefault(place, {})[row.backend] = row.median
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    body = ((*place, *(number(cells.get(name)) for name in names)) for place, cells in found.items())
    return markdown(("pass", "batch, dim, seqlen", *names), body)


def gpu_step_table(run: Run) -> str:
    """Tokens per second and peak memory of a training step, or that it did not fit."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in run.rows:
        if row.pass_ == "step":
            place = (f"{row.batch} x {row.seqlen}", f"{row.variant}, width {row.dim}", row.backend)
            found.setdefault(place, {})[row.metric] = row.median
    body = []
    for place, cells in found.items():
        rate = "out of memory" if "out of memory" in cells else number(cells.get("throughput"))
        body.append((*place, number(cells.get("gpu time")), rate, number(cells.get("peak memory"))))
    return markdown(("tokens", "method", "implementation", "step, ms", "tokens/s", "peak, MiB"), body)


def instruction_section(rows: Sequence[instruction_counts.Row]) -> str:
    """What the compiled kernels cost, a line for each kernel and case with all targets side by side."""
    targets = list(dict.fromkeys(row.target for row in rows))
    counted = [target for target in targets if any(row.target == target and row.instructions for row in rows)]
    by_case: dict[tuple[str, str], dict[str, instruction_counts.Row]] = {}
    for row in rows:
        by_case.setdefault((row.kernel.removesuffix("_kernel"), row.case), {})[row.target] = row
    body = []
    for (kernel, case), found in by_case.items():
        first = next(iter(found.values()))
        counts = [_count(found[target]) if target in found else "" for target in counted]
        registers = "/".join(str(found[target].registers) if target in found else "" for target in targets)
        shared = str(max(row.shared for row in found.values()))
        bound = "" if first.bound is None else f"<= {first.bound:g}"
        body.append((kernel, case, first.per, *counts, bound, registers, shared))
    header = ("kernel", "case", "for each", *counted, "bound", f"registers, {'/'.join(targets)}", "shared, bytes")
    return f"### Instructions of {rows[0].compiler}\n\n{markdown(header, body)}"


def _count(row: instruction_counts.Row) -> str:
    return number(row.instructions) if row.products is None else f"{row.products} MMA"


def rewrite(readme: Path, folder: Path) -> None:
    """Put the tables of every CSV file of a folder, and of its subfolder "compiled", between the markers of a README.

    Raises:
        ValueError: the README has no markers.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} has no place for the tables.\n  Put a line {BEGIN} and a line {END} into it.")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    sections = [section(path) for path in sorted(folder.glob("*.csv"))]
    sections += [instruction_section(instruction_counts.read(path)) for path in sorted(folder.glob("compiled/*.csv"))]
    readme.write_text(before + BEGIN + "\n\n" + "\n".join(sections or ["Nothing measured yet.\n"]) + "\n" + END + after)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    rewrite(options.readme, options.results)
    print(f"{options.readme} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())

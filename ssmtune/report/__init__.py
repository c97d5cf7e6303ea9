"""The report of one comparison or of several side by side, drawn from stored cells alone."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmtune.config import ConfigError
from ssmtune.report import pictures
from ssmtune.report.notes import conditions, machine, problems, reading
from ssmtune.report.studies import Study, by_task, read_studies
from ssmtune.report.table import best_row, columns
from ssmtune.run_directory import write_whole


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote."""

    studies: list[Study]
    markdown: Path
    html: Path
    table: Path
    pictures: list[Path]


def write_report(directories: Path | Sequence[Path], out: Path | None = None) -> Report:
    """Write report.md, report.html, results.csv and pictures/ for one comparison, or for several side by side.

    Args:
        directories: those of the comparisons.
        out: where to write; a single comparison's own directory by default.

    Raises:
        ConfigError: one is not the directory of a comparison, or several are given without `out`.
    """
    from ssmtune.report.html import html_page
    from ssmtune.report.markdown import markdown

    directories = [Path(place) for place in ([directories] if isinstance(directories, (str, Path)) else directories)]
    if out is None and len(directories) > 1:
        raise ConfigError(f"{len(directories)} comparisons make one report.\n  Say where to write it with --out DIR.")
    studies = read_studies(directories)
    out = Path(out or directories[0])
    out.mkdir(parents=True, exist_ok=True)
    drawn = _draw(studies, out) if pictures.available() else {}
    write_whole(out / "report.md", markdown(studies, drawn))
    write_whole(out / "report.html", html_page(studies))
    write_whole(out / "results.csv", csv_table(studies))
    places = [out / place for several in drawn.values() for place in several]
    return Report(studies, out / "report.md", out / "report.html", out / "results.csv", places)


def _draw(studies: Sequence[Study], out: Path) -> dict[tuple[str, str], list[str]]:
    """Draws the pictures; (study, task) -> their places in `out`."""
    drawn: dict[tuple[str, str], list[str]] = {}
    (out / "pictures").mkdir(exist_ok=True)
    for study in studies:
        prefix = f"{study.name.replace('/', '-')}-" if len(studies) > 1 else ""
        for task in study.summary.tasks:
            for kind, draw in pictures.PICTURES.items():
                if (image := draw(task)) is not None:
                    place = f"pictures/{prefix}{task.name}-{kind}.png"
                    write_whole(out / place, image)
                    drawn.setdefault((study.name, task.name), []).append(place)
    return drawn


def csv_table(studies: Sequence[Study]) -> str:
    """One line per comparison, task, method, run and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    costs = {
        "lr": "lr",
        "trainable": "trainable",
        "total": "total",
        "train_seconds": "seconds",
        "tokens_per_second": "tokens_per_second",
        "peak_memory_bytes": "peak_memory",
        "file_bytes": "file_size",
        "decode_ms_per_token": "decode_ms",
    }
    writer.writerow(["model", "task", "method", "run", "metric", "value", *costs])
    for study in studies:
        for task in study.summary.tasks:
            for row in task.rows:
                metrics = {task.metric: row.scores, **row.others} if row.scores is not None else {}
                common = [getattr(row, name) for name in costs.values()]
                for metric, spread in metrics.items():
                    for run, value in enumerate(spread.values):
                        writer.writerow([study.name, task.name, row.name, run, metric, value, *common])
    return buffer.getvalue()


def print_report(report: Report, stream=None) -> None:
    """The tables with their conditions: in colour on a terminal, plain text anywhere else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stream = stream or sys.stdout
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    faint = None if plain else "dim"
    console = Console(
        file=stream,
        no_color=plain,
        highlight=False,
        soft_wrap=False,
        width=None if stream.isatty() else 140,
    )
    for name, held in by_task(report.studies):
        for study, task in held:
            shown = [column for column in columns(task) if column.brief]
            table = Table(title=f"{name} ({study.name})", title_justify="left", box=box.SIMPLE_HEAD)
            best = best_row(task)
            for index, column in enumerate(shown):
                table.add_column(column.header, justify="left" if index == 0 else "right", no_wrap=True)
            for row in task.rows:
                style = "bold" if row is best and not plain else None
                table.add_row(*(column.text(row) for column in shown), style=style)
            console.print(table)
            for line in (reading(task), *conditions(study.summary, task), *problems(task)):
                console.print(line, markup=False, style=faint)
            console.print()
    for study in report.studies:
        console.print(machine(study.summary), markup=False, style=faint)
    if not pictures.available():
        console.print(pictures.MISSING, markup=False)

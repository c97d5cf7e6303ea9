"""The report of a comparison, drawn from its stored cells alone: tables, Markdown, HTML and pictures."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ssmtune import plots
from ssmtune.run_directory import write_whole
from ssmtune.summary import MethodRow, Spread, Summary, TaskSummary, summarize

SHORT_METRICS = {
    "accuracy": "accuracy %",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "bleu": "BLEU",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bits_per_character": "bits/char",
    "execution": "execution %",
    "exact_match": "exact match %",
}


@dataclass(frozen=True)
class Column:
    """A column of the table: `brief` ones are in the terminal's too, whose width is short."""

    header: str
    cell: Callable[[MethodRow], str]
    brief: bool = True


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote."""

    summary: Summary
    markdown: Path
    html: Path
    table: Path
    pictures: list[Path]


def write_report(out: Path) -> Report:
    """Write report.md, report.html, results.csv and pictures/ into the directory of a comparison.

    Raises:
        ConfigError: `out` is not the directory of a comparison.
    """
    from ssmtune.report_html import html_page

    out = Path(out)
    summary = summarize(out)
    images: dict[str, dict[str, tuple[bytes, bytes]]] = {}
    files: list[Path] = []
    if plots.available():
        (out / "pictures").mkdir(exist_ok=True)
        for task in summary.tasks:
            for kind, draw in (("quality", plots.quality_picture), ("learning", plots.learning_picture)):
                light = draw(task)
                if light is None:
                    continue
                images.setdefault(task.name, {})[kind] = (light, draw(task, plots.DARK))
                files.append(out / "pictures" / f"{task.name}-{kind}.png")
                write_whole(files[-1], light)
    write_whole(out / "report.md", markdown(summary, {name: list(kinds) for name, kinds in images.items()}))
    write_whole(out / "report.html", html_page(summary, images))
    write_whole(out / "results.csv", csv_table(summary))
    return Report(summary, out / "report.md", out / "report.html", out / "results.csv", files)


def columns(task: TaskSummary) -> list[Column]:
    """The columns of a task's table."""
    reference = next((row.title for row in task.rows if row.name == task.reference), None)
    versus = [Column(f"vs {reference}", lambda row: with_interval(row.difference, signed=True))] if reference else []
    others = dict.fromkeys(name for row in task.rows for name in row.others if name != "loss")
    return [
        Column("method", lambda row: row.title),
        Column(SHORT_METRICS.get(task.metric, task.metric), score_text),
        Column("95 % interval", lambda row: interval_text(row.scores), brief=False),
        *versus,
        *(
            Column(SHORT_METRICS.get(name, name), lambda row, name=name: mean_text(row.others.get(name)), brief=False)
            for name in others
        ),
        Column("trainable", lambda row: "" if row.trainable is None else f"{row.trainable:,}"),
        Column("%", lambda row: share_text(row)),
        Column("lr", lambda row: "" if row.lr is None else f"{row.lr:.1e}" + ("*" if row.at_edge else "")),
        Column("seeds", lambda row: str(len(row.scores.values)) if row.lr and row.scores else "", brief=False),
        Column("train s", lambda row: "" if row.seconds is None else f"{row.seconds:.1f}", brief=False),
        Column("tok/s", lambda row: "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"),
        Column("peak MB", lambda row: "" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f}"),
        Column("saved KB", lambda row: "" if row.file_size is None else f"{row.file_size / 1024:,.1f}"),
        Column("ms/token", lambda row: "" if row.decode_ms is None else f"{row.decode_ms:.1f}"),
    ]


def score_text(row: MethodRow) -> str:
    """`61.3 ± 1.2`, with the number of failed checks or runs; `failed` if nothing was measured."""
    if row.scores is None:
        return "failed" if row.errors else "not run yet"
    text = mean_text(row.scores)
    return text + (" !" if row.checks else "")


def mean_text(spread: Spread | None) -> str:
    """`61.3 ± 1.2`: mean and standard deviation."""
    if spread is None:
        return ""
    digits = _digits(spread.mean)
    text = f"{spread.mean:.{digits}f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:.{digits}f}"


def interval_text(spread: Spread | None) -> str:
    """`[58.1, 64.5]`."""
    if spread is None or spread.interval is None:
        return ""
    digits = _digits(spread.mean)
    return f"[{spread.mean - spread.interval:.{digits}f}, {spread.mean + spread.interval:.{digits}f}]"


def with_interval(spread: Spread | None, signed: bool = False) -> str:
    """`+1.2 ± 3.4`: mean and half-width of its 95 % interval."""
    if spread is None or not math.isfinite(spread.mean):
        return ""
    size = max(abs(spread.mean), spread.interval or 0)
    digits = _digits(size)
    sign = "+" if signed else ""
    return f"{spread.mean:{sign}.{digits}f}" + ("" if spread.interval is None else f" ± {spread.interval:.{digits}f}")


def share_text(row: MethodRow) -> str:
    if not row.total or row.trainable is None:
        return ""
    share = 100 * row.trainable / row.total
    return "0" if not share else f"{share:.3f}" if share < 1 else f"{share:.1f}"


def _digits(value: float) -> int:
    return 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3


def best_row(task: TaskSummary) -> MethodRow | None:
    ranked = task.ranked()
    return ranked[0] if ranked else None


def reading(task: TaskSummary) -> str:
    """How to read a task's table."""
    reference = next((row.title for row in task.rows if row.name == task.reference), None)
    text = f"{SHORT_METRICS.get(task.metric, task.metric)} on test, "
    text += f"{'higher' if task.higher_is_better else 'lower'} is better: mean ± standard deviation over seeds."
    if reference is not None:
        text += f" vs {reference}: mean of the paired differences by seed ± half-width of its 95 % t-interval."
    text += " peak MB: of the whole process while training. ms/token: decoding one text greedily."
    text += " lr: peak learning rate, picked on dev."
    if any(row.at_edge for row in task.rows):
        text += " *: the least or greatest of its grid, so a wider grid may give another."
    if any(row.checks for row in task.rows):
        text += " !: failed a check before training, see below."
    return text


def conditions(summary: Summary, task: TaskSummary) -> list[str]:
    """The conditions of a task's results, a sentence each."""
    config = summary.config
    sizes = task.sizes
    lines = [
        f"Task: {task.description}.",
        f"Examples: {sizes['train']:,} to train on, {sizes['dev']:,} dev, {sizes['test']:,} test.",
        f"Model: {config['model']}. Every method: {config['steps']:,} steps of {config['batch_size']} examples "
        f"({config['steps'] * config['batch_size'] / sizes['train']:.1f} passes over the training examples), AdamW"
        f"{' in bfloat16 autocast' if config['autocast'] else ''}, "
        f"learning rate rising over {100 * config['warmup']:.0f} % of the steps, then falling linearly to 0; the last "
        "weights are measured; for one seed all methods see the same batches.",
    ]
    factors = ", ".join(f"{factor:.3g}" for factor in config["lr_factors"])
    if len(config["lr_factors"]) > 1:
        lines.append(
            f"Learning rates: for every method its default times {factors}, {config['search_steps']:,} steps each with "
            f"{config['search_seeds']} seed{'s' if config['search_seeds'] > 1 else ''} of the search's own; the rate "
            "of the lowest dev loss is picked."
        )
    else:
        lines.append(f"Learning rates: every method's default times {factors}, no search.")
    if task.choices:
        best = best_row(task)
        share = best.scores.mean / 100 if best else 0.5
        error = 100 * math.sqrt(share * (1 - share) / sizes["test"])
        lines.append(
            f"Guessing gives {100 / task.choices:.1f} %. Seeds show the spread of training alone: the choice of "
            f"{sizes['test']:,} test examples adds a standard error of about {error:.1f} points to each accuracy."
        )
    return lines


def machine(summary: Summary) -> str:
    """Where, when and with which versions."""
    environment = summary.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    revision = f" ({environment['revision']})" if environment.get("revision") else ""
    return (
        f"{environment['device']}, {environment['threads']} threads; {packages}{revision}, "
        f"Python {environment['python']}; {summary.runs} runs, {timedelta(seconds=round(summary.seconds))} in all, "
        f"finished {summary.last_run[:19].replace('T', ' ')} UTC."
    )


def problems(task: TaskSummary) -> list[str]:
    """Failed checks and runs, a line each."""
    lines = [f"{row.title}: check of {check}" for row in task.rows for check in row.checks]
    lines += [f"{row.title}: run failed: {first_line(error)}" for row in task.rows for error in row.errors]
    return lines


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def search_table(task: TaskSummary) -> list[tuple[str, list[str]]]:
    """(method, its learning rates with their dev losses), the picked one marked."""
    table = []
    for row in task.rows:
        if row.search:
            cells = []
            for lr, loss in row.search.items():
                text = f"{lr:.1e}: {'failed' if loss is None else f'{loss:.4f}'}"
                cells.append(f"**{text}**" if lr == row.lr else text)
            table.append((row.title, cells))
    return table


def markdown(summary: Summary, pictures: dict[str, list[str]]) -> str:
    """The report as Markdown, with pictures from the folder beside it."""
    lines = [f"# Comparison of fine-tuning methods on {summary.config['model']}", ""]
    for task in summary.tasks:
        table = columns(task)
        best = best_row(task)
        lines += [f"## {task.name}", ""]
        lines += ["| " + " | ".join(column.header for column in table) + " |"]
        lines += ["|" + "|".join(["---"] + ["---:"] * (len(table) - 1)) + "|"]
        for row in task.rows:
            cells = [column.cell(row) for column in table]
            if row is best:
                cells[:2] = [f"**{cell}**" for cell in cells[:2]]
            lines += ["| " + " | ".join(cells) + " |"]
        lines += ["", reading(task), ""]
        for kind in pictures.get(task.name, []):
            lines += [f"![{task.name}, {kind}](pictures/{task.name}-{kind}.png)", ""]
        if pictures.get(task.name):
            lines += [CAPTION, ""]
        elif not plots.available():
            lines += [plots.MISSING, ""]
        if found := problems(task):
            lines += ["Problems:", "", *(f"- {line}" for line in found), ""]
        if search := search_table(task):
            lines += ["Learning-rate search, dev loss:", ""]
            lines += [f"- {title}: {', '.join(cells)}" for title, cells in search] + [""]
        lines += ["Conditions:", "", *(f"- {line}" for line in conditions(summary, task)), ""]
    lines += ["## Machine", "", machine(summary), ""]
    if command := summary.environment.get("command"):
        lines += ["Command:", "", f"    {command}", ""]
    return "\n".join(lines)


CAPTION = (
    "Quality: mean, standard deviation (bars) and every seed (ticks); the dashed line is the Pareto front, on which no "
    "method is beaten by another with as few parameters. Curves: mean over seeds, with the range between them."
)


def csv_table(summary: Summary) -> str:
    """One line per task, method, run and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "task",
            "method",
            "run",
            "metric",
            "value",
            "lr",
            "trainable",
            "total",
            "train_seconds",
            "tokens_per_second",
            "peak_memory_bytes",
            "file_bytes",
            "decode_ms_per_token",
        ]
    )
    for task in summary.tasks:
        for row in task.rows:
            metrics = {task.metric: row.scores, **row.others} if row.scores is not None else {}
            for metric, spread in metrics.items():
                for run, value in enumerate(spread.values):
                    writer.writerow(
                        [
                            task.name,
                            row.name,
                            run,
                            metric,
                            value,
                            row.lr,
                            row.trainable,
                            row.total,
                            row.seconds,
                            row.tokens_per_second,
                            row.peak_memory,
                            row.file_size,
                            row.decode_ms,
                        ]
                    )
    return buffer.getvalue()


def print_report(report: Report, stream=None) -> None:
    """The tables with their conditions: in colour on a terminal, plain text anywhere else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stream = stream or sys.stdout
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    console = Console(
        file=stream,
        no_color=plain,
        highlight=False,
        soft_wrap=False,
        width=None if stream.isatty() else 140,
    )
    for task in report.summary.tasks:
        shown = [column for column in columns(task) if column.brief]
        title = f"{task.name} ({report.summary.config['model']})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        best = best_row(task)
        for index, column in enumerate(shown):
            table.add_column(column.header, justify="left" if index == 0 else "right", no_wrap=True)
        for row in task.rows:
            table.add_row(*(column.cell(row) for column in shown), style="bold" if row is best and not plain else None)
        console.print(table)
        for line in (reading(task), *conditions(report.summary, task), *problems(task)):
            console.print(line, markup=False, style=None if plain else "dim")
        console.print()
    console.print(machine(report.summary), markup=False, style=None if plain else "dim")
    if not report.pictures and not plots.available():
        console.print(plots.MISSING, markup=False)

"""What a report says in words: how a table is read, and the conditions it was made under."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta

from ssmtune.report.studies import Study
from ssmtune.report.table import best_row, difference_text, reference_title, short
from ssmtune.summary import Summary, TaskSummary

CAPTION = (
    "Quality: mean, standard deviation (bars) and every seed (ticks); the dashed line is the Pareto front, on which no "
    "method is beaten by another with as few parameters. Curves: mean over seeds, with the range between them. "
    "Differences: paired by seed, with their 95 % intervals."
)

PAIRS = "Pairs of methods that the bootstrap tells apart, p adjusted for all pairs (Holm) below 0.05:"


def title(studies: Sequence[Study]) -> str:
    return f"Comparison of fine-tuning methods on {', '.join(study.name for study in studies)}"


def reading(task: TaskSummary) -> str:
    """How to read a task's table."""
    reference = reference_title(task)
    text = f"{short(task.metric)} on test, {'higher' if task.higher_is_better else 'lower'} is better: "
    text += "mean ± standard deviation over seeds."
    if reference is not None:
        text += f" vs {reference}: mean of the paired differences by seed ± half-width of its 95 % t-interval."
    if task.pairs:
        text += " bootstrap: the same difference and its 95 % interval over examples and seeds."
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
        f"Model: {config['model']}. Every method: {task.steps:,} steps of {config['batch_size']} examples "
        f"({task.steps * config['batch_size'] / sizes['train']:.1f} passes over the training examples), AdamW"
        f"{' in bfloat16 autocast' if config['autocast'] else ''}, "
        f"learning rate rising over {100 * config['warmup']:.0f} % of the steps, then falling linearly to 0; the last "
        "weights are measured; for one seed all methods see the same batches.",
    ]
    factors = ", ".join(f"{factor:.3g}" for factor in config["lr_factors"])
    if len(config["lr_factors"]) > 1:
        lines.append(
            f"Learning rates: for every method its default times {factors}, {task.search_steps:,} steps each with "
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


def pairs_told_apart(task: TaskSummary) -> list[str]:
    """The pairs of methods that the bootstrap tells apart, a line each."""
    titles = {row.name: row.title for row in task.rows}
    return [
        f"{titles[first]} and {titles[second]}: {difference_text(difference)}, p = {difference.adjusted:.3f}"
        for (first, second), difference in task.pairs.items()
        if difference.adjusted < 0.05
    ]


def ranking(summary: Summary) -> str | None:
    """The average ranks over tasks, in a sentence; None for a single task."""
    ranks = summary.ranks
    if ranks.tasks < 2 or not ranks.mean:
        return None
    titles = {row.name: row.title for task in summary.tasks for row in task.rows}
    text = f"Average rank over {ranks.tasks} tasks, 1 is best: "
    text += ", ".join(f"{titles[name]} {rank:.2f}" for name, rank in ranks.mean.items()) + "."
    if ranks.critical_difference is None:
        return f"{text} These are too few tasks to say which ranks differ by more than chance."
    return f"{text} Ranks that differ by less than {ranks.critical_difference:.2f} are not told apart (Nemenyi, 5 %)."


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

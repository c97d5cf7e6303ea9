"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ssmtune.report import pictures
from ssmtune.report.notes import (
    CAPTION,
    PAIRS,
    conditions,
    machine,
    pairs_told_apart,
    problems,
    ranking,
    reading,
    search_table,
    title,
)
from ssmtune.report.studies import Study, by_task
from ssmtune.report.table import best_row, columns
from ssmtune.summary import TaskSummary


def markdown(studies: Sequence[Study], drawn: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """The report as Markdown.

    Args:
        drawn: (study, task) -> places of its pictures beside the file.
    """
    lines = [f"# {title(studies)}", ""]
    for name, held in by_task(studies):
        lines += [f"## {name}", ""]
        for study, task in held:
            if len(studies) > 1:
                lines += [f"### {name}: {study.name}", ""]
            lines += [*_markdown_table(task), "", reading(task), ""]
            places = drawn.get((study.name, name), [])
            lines += [line for place in places for line in (f"![{Path(place).stem}]({place})", "")]
            if places:
                lines += [CAPTION, ""]
            elif not pictures.available():
                lines += [pictures.MISSING, ""]
            if task.pairs:
                lines += [PAIRS, "", *(f"- {line}" for line in pairs_told_apart(task) or ["none"]), ""]
            if found := problems(task):
                lines += ["Problems:", "", *(f"- {line}" for line in found), ""]
            if search := search_table(task):
                lines += ["Learning-rate search, dev loss:", ""]
                lines += [f"- {method}: {', '.join(cells)}" for method, cells in search] + [""]
            lines += ["Conditions:", "", *(f"- {line}" for line in conditions(study.summary, task)), ""]
    for study in studies:
        if (ranks := ranking(study.summary)) is not None:
            lines += ["## Ranks" + (f": {study.name}" if len(studies) > 1 else ""), "", ranks, ""]
    lines += ["## Machine", ""]
    for study in studies:
        named = f"{study.name}: " if len(studies) > 1 else ""
        lines += [named + machine(study.summary), ""]
        if command := study.summary.environment.get("command"):
            lines += ["Command:", "", f"    {command}", ""]
    return "\n".join(lines)


def _markdown_table(task: TaskSummary) -> Iterator[str]:
    table, best = columns(task), best_row(task)
    yield f"| {' | '.join(column.header for column in table)} |"
    yield "|" + "|".join(["---"] + ["---:"] * (len(table) - 1)) + "|"
    for row in task.rows:
        cells = [column.text(row) for column in table]
        if row is best:
            cells[:2] = [f"**{cell}**" for cell in cells[:2]]
        yield f"| {' | '.join(cells)} |"

"""A report as one HTML file that needs nothing else: a table to sort and filter, and charts that a script draws.

The page forbids itself every request, and every script and style but its own. What it holds besides the table is data
(JSON), which the script puts into the page as text: no name or message of a run can be markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssmtune.report.notes import (
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
from ssmtune.report.pictures import styles
from ssmtune.report.studies import Study, by_task
from ssmtune.report.table import Column, best_row, columns, merged, reference_title, short
from ssmtune.summary import MethodRow, Spread, TaskSummary

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("rows.js", "table.js", "axes.js", "charts.js")
KINDS = {"base": "base", "state": "states", "prompt": "virtual tokens", "weights": "weights", "full": "all weights"}


def html_page(studies: Sequence[Study]) -> str:
    """The whole page."""
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src {_source(style)}; script-src {_source(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title(studies))}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escape(title(studies))}</h1>
<p class="lead">{escape(_lead(studies))}</p>
<div id="filters"></div>
{_table(studies)}
<noscript><p class="note">Sorting, filters and charts need JavaScript; report.md has pictures.</p></noscript>
<div id="charts"></div>
{"".join(_section(*held) for held in by_task(studies))}
<section><h2>Machine and commands</h2>
{"".join(_made_by(study, named=len(studies) > 1) for study in studies)}
</section>
</main>
<script type="application/json" id="data">{_inert(_data(studies))}</script>
<script>{script}</script>
</body>
</html>
"""


def _source(content: str) -> str:
    """What a content security policy calls this very script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _inert(data: Any) -> str:
    """JSON that cannot end the script element it is in; infinities, which JSON has not, become null."""
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _lead(studies: Sequence[Study]) -> str:
    sentences = []
    for study in studies:
        config, summary = study.summary.config, study.summary
        failed = f", {summary.failed} of them failed" if summary.failed else ""
        named = f"{study.name}: " if len(studies) > 1 else ""
        steps = " or ".join(f"{count:,}" for count in sorted({task.steps for task in summary.tasks}))
        sentences.append(
            f"{named}{len(config['methods'])} methods, {config['seeds']} seeds, {steps} steps each after "
            f"the same learning-rate search; {summary.runs} runs{failed}."
        )
    return " ".join(sentences)


def _rows(studies: Sequence[Study]) -> Iterator[tuple[Study, TaskSummary, MethodRow]]:
    for _, held in by_task(studies):
        for study, task in held:
            for row in task.rows:
                yield study, task, row


def _table(studies: Sequence[Study]) -> str:
    tables = {(study.name, task.name): columns(task) for _, held in by_task(studies) for study, task in held}
    method, *headers = merged(tables.values())
    head = "".join(f"<th>{escape(header)}</th>" for header in ("task", "model", method, "kind", *headers))
    body = []
    for study, task, row in _rows(studies):
        known = {column.header: column for column in tables[study.name, task.name]}
        cells = [f"<td>{escape(text)}</td>" for text in (task.name, study.name, row.title, KINDS[row.kind])]
        cells += [_cell(known.get(header), row) for header in headers]
        kind = "best" if row is best_row(task) else row.kind
        body.append(f"<tr class='{kind}'>{''.join(cells)}</tr>")
    rows = "\n".join(body)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"


def _cell(column: Column | None, row: MethodRow) -> str:
    if column is None:
        return "<td></td>"
    text, value = column.text(row), column.value(row) if column.value else None
    failed = " class='failed'" if text == "failed" else ""
    return f"<td{failed}{'' if value is None else f' data-value={value!r}'}>{escape(text)}</td>"


def _data(studies: Sequence[Study]) -> dict[str, Any]:
    """What the script draws from; its rows are those of the table, in their order."""
    style = styles(row.name for _, _, row in _rows(studies) if row.name != "base")
    axes: dict[str, str] = {}
    rows = []
    for study, task, row in _rows(studies):
        values = {}
        for column in columns(task):
            if column.better is not None:
                axes.setdefault(column.header, column.better)
                if (value := column.value(row)) is not None:
                    values[column.header] = value
        rows.append(
            {
                "task": task.name,
                "model": study.name,
                "kind": KINDS[row.kind],
                "title": row.title,
                "colour": style.get(row.name),
                "values": values,
                "spread": None if row.scores is None else row.scores.deviation,
                "difference": _points(row.difference),
                "curves": list(row.curves.values()),
            }
        )
    tasks = {
        f"{task.name}\n{study.name}": {
            "metric": short(task.metric),
            "better": "higher" if task.higher_is_better else "lower",
            "reference": reference_title(task),
        }
        for _, held in by_task(studies)
        for study, task in held
    }
    return {"rows": rows, "axes": axes, "tasks": tasks}


def _points(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"mean": spread.mean, "interval": spread.interval, "values": list(spread.values)}


def _section(name: str, held: Sequence[tuple[Study, TaskSummary]]) -> str:
    parts = [f"<section><h2>{escape(name)}</h2>"]
    for study, task in held:
        parts.append(f"<h3>On {escape(study.name)}</h3><p class='note'>{escape(reading(task))}</p>")
        if task.pairs:
            told = _list(pairs_told_apart(task) or ["none"])
            parts.append(f"<details><summary>{escape(PAIRS)}</summary>{told}</details>")
        if found := problems(task):
            parts.append(f"<div class='problems'><p>Problems</p>{_list(found)}</div>")
        if search := search_table(task):
            lines = [f"{method}: {', '.join(cells)}" for method, cells in search]
            parts.append(f"<details><summary>Learning-rate search, dev loss</summary>{_list(lines)}</details>")
        parts.append(f"<details><summary>Conditions</summary>{_list(conditions(study.summary, task))}</details>")
    return "\n".join([*parts, "</section>"])


def _made_by(study: Study, named: bool) -> str:
    command = study.summary.environment.get("command")
    text = f"{study.name}: {machine(study.summary)}" if named else machine(study.summary)
    if (ranks := ranking(study.summary)) is not None:
        text = f"{ranks} {text}"
    return f"<p class='note'>{escape(text)}</p>" + (f"<pre>{escape(command)}</pre>" if command else "")


def _list(lines: Sequence[str]) -> str:
    items = []
    for line in lines:
        # **bold** is the only markup that the lines of a report have
        pieces = escape(line).split("**")
        items.append("<li>" + "".join(f"<b>{text}</b>" if i % 2 else text for i, text in enumerate(pieces)) + "</li>")
    return f"<ul>{''.join(items)}</ul>"

"""The report of a comparison as one HTML file that needs nothing else: pictures inside, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from ssmtune import plots, report
from ssmtune.summary import Summary, TaskSummary

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --text: #1f2328; --faint: #59636e; --line: #d8dee4;
        --accent: #0072b2; --warn: #9a3412; --best: #e8f3fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --faint: #9198a1; --line: #30363d; --accent: #56b4e9;
          --warn: #ffb454; --best: #12293a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.55rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
p, ul { max-width: 78ch; }
.lead, .note { color: var(--faint); }
.note { font-size: .87rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--card); color: var(--faint); font-weight: 600; cursor: pointer; user-select: none; }
tbody tr:last-child td { border-bottom: 0; }
tr.best td { background: var(--best); font-weight: 600; }
tr.base td { color: var(--faint); }
td.failed { color: var(--warn); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem;
            margin: 1.2rem 0 .4rem; }
.pictures img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; display: block; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
.problems { border-left: 3px solid var(--warn); padding: .1rem 1rem; }
code { background: var(--card); padding: .1rem .35rem; border-radius: 4px; font-size: .86em; overflow-wrap: anywhere; }
"""

# Sorts a table by the column that is clicked; numbers by their first number, empty cells last.
SCRIPT = """
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const table = head.closest('table'), body = table.tBodies[0], place = [...head.parentNode.children].indexOf(head);
  const rising = head.dataset.order !== 'up';
  table.querySelectorAll('th').forEach(other => delete other.dataset.order);
  head.dataset.order = rising ? 'up' : 'down';
  const key = row => {
    const text = row.children[place].textContent.trim(), number = parseFloat(text.replace(/,/g, '').replace('−', '-'));
    return place === 0 || Number.isNaN(number) ? (text || null) : number;
  };
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return rising ? order : -order;
  }).forEach(row => body.append(row));
}));
"""


def html_page(summary: Summary, images: Mapping[str, Mapping[str, tuple[bytes, bytes]]]) -> str:
    """The whole page.

    Args:
        images: task -> kind -> PNG for light pages and PNG for dark ones.
    """
    config = summary.config
    title = f"Fine-tuning methods on {config['model']}"
    failed = f", {summary.failed} of them failed" if summary.failed else ""
    lead = (
        f"{len(config['methods'])} methods, {config['seeds']} seeds, {config['steps']:,} steps each after the same "
        f"learning-rate search; {summary.runs} runs{failed}."
    )
    sections = "\n".join(_section(summary, task, images.get(task.name, {})) for task in summary.tasks)
    command = summary.environment.get("command")
    again = f"<p class='note'>Command: <code>{escape(command)}</code></p>" if command else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{sections}
<h2>Machine</h2>
<p class="note">{escape(report.machine(summary))}</p>
{again}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(summary: Summary, task: TaskSummary, images: Mapping[str, tuple[bytes, bytes]]) -> str:
    parts = [f"<section>\n<h2>{escape(task.name)}</h2>", _table(task)]
    parts.append(f"<p class='note'>{escape(report.reading(task))}</p>")
    if images:
        pictures = "\n".join(_picture(task, kind, *pair) for kind, pair in images.items())
        parts.append(f"<div class='pictures'>{pictures}</div>\n<p class='note'>{escape(report.CAPTION)}</p>")
    elif not plots.available():
        parts.append(f"<p class='note'>{escape(plots.MISSING)}</p>")
    if found := report.problems(task):
        parts.append(f"<div class='problems'><p>Problems</p>{_list(found)}</div>")
    if search := report.search_table(task):
        lines = [f"{title}: {', '.join(cells)}" for title, cells in search]
        parts.append(f"<details><summary>Learning-rate search, dev loss</summary>{_list(lines)}</details>")
    held = _list(report.conditions(summary, task))
    parts.append(f"<details open><summary>Conditions</summary>{held}</details>\n</section>")
    return "\n".join(parts)


def _table(task: TaskSummary) -> str:
    columns, best = report.columns(task), report.best_row(task)
    head = "".join(f"<th>{escape(column.header)}</th>" for column in columns)
    body = []
    for row in task.rows:
        kind = "best" if row is best else "base" if row.name == "base" else ""
        cells = []
        for column in columns:
            text = column.cell(row)
            cells.append(f"<td class='failed'>{escape(text)}</td>" if text == "failed" else f"<td>{escape(text)}</td>")
        body.append(f"<tr class='{kind}'>{''.join(cells)}</tr>")
    rows = "\n".join(body)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"


def _picture(task: TaskSummary, kind: str, light: bytes, dark: bytes) -> str:
    sources = [base64.b64encode(image).decode() for image in (light, dark)]
    text = escape({"quality": "quality against trainable parameters", "learning": "learning curves"}[kind])
    return (
        f"<picture><source media='(prefers-color-scheme: dark)' srcset='data:image/png;base64,{sources[1]}'>"
        f"<img alt='{escape(task.name)}: {text}' src='data:image/png;base64,{sources[0]}'></picture>"
    )


def _list(lines: list[str]) -> str:
    items = []
    for line in lines:
        # **bold** is the only markup that the lines of a report have
        pieces = escape(line).split("**")
        items.append("<li>" + "".join(f"<b>{text}</b>" if i % 2 else text for i, text in enumerate(pieces)) + "</li>")
    return f"<ul>{''.join(items)}</ul>"

"""The tables of docs/models.md, written from what the conformance checks of one run found."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from textwrap import fill

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by tests/families, not by hand -->\n", "<!-- end of what is written -->\n"
_VERSIONS = "Found with "
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Outcomes:
    """What the checks of this run found.

    Args:
        families: the names of all families, one table each.
        methods: the names of all methods, one column each.
        cells: by (family, method, check) one of passed, skipped, known, failed, and the reason where there is one.
        meanings: the first lines of the documentation of all checks, also of those that did not run.
    """

    families: Sequence[str]
    methods: Sequence[str]
    cells: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)

    def record(self, family: str, method: str, test: Callable, report: pytest.TestReport) -> None:
        """Take the report of one phase of a test; success counts only where the test itself has run."""
        if not self.meanings:
            tests = [value for name, value in test.__globals__.items() if name.startswith("test_")]
            self.meanings = {check_name(test): inspect.getdoc(test) for test in tests}
        if report.passed and report.when != "call":
            return
        if report.skipped and hasattr(report, "wasxfail"):
            found = "known", report.wasxfail.removeprefix("reason: ")
        elif report.skipped:
            found = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        else:
            found = report.outcome, ""
        self.cells[family, method, check_name(test)] = found

    def complete(self) -> bool:
        """Whether every cell of the page has an outcome."""
        cells = set(product(self.families, self.methods, self.meanings))
        return bool(cells) and cells <= self.cells.keys()

    def failed(self) -> list[tuple[str, str, str]]:
        """The cells that failed and are not known to."""
        return [cell for cell, (outcome, _) in self.cells.items() if outcome == "failed"]

    def untrue(self, generated: str) -> list[tuple[str, str, str]]:
        """The cells of this run that a generated part shows otherwise; those that failed are red by themselves."""
        shown = _read(generated)
        return [
            name
            for name, (outcome, reason) in self.cells.items()
            if outcome != "failed" and shown.get(name) != (_sign(outcome), _sentence(reason) if reason else "")
        ]

    def render(self) -> str:
        """The generated part of the page, without its markers."""
        versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("transformers", "peft", "torch"))
        notes: dict[str, str] = {}
        count = [["", *self.methods]]
        tables = []
        for family in self.families:
            of_family = {
                method: [self.cells[family, method, check] for check in self.meanings] for method in self.methods
            }
            count.append([family, *(_count([outcome for outcome, _ in cells]) for cells in of_family.values())])
            rows = [
                [check, *(cell(*of_family[method][index], notes) for method in self.methods)]
                for index, check in enumerate(self.meanings)
            ]
            tables.append(f"### {family}\n\n{table([['', *self.methods], *rows])}")
        parts = [
            f"{_VERSIONS}{versions}.",
            "Checks that hold, of those that apply:",
            table(count),
            "\n".join(
                fill(f"- **{check}**: {text}", 118, subsequent_indent="  ", break_on_hyphens=False)
                for check, text in self.meanings.items()
            ),
            "✓ holds, – does not apply, ✗ does not hold; the small numbers are those of the notes below.",
            *tables,
            "### Notes",
            "\n".join(f"{number}. {_sentence(reason)}" for reason, number in notes.items()),
        ]
        return "\n\n".join(parts) + "\n"


OUTCOMES = pytest.StashKey[Outcomes]()


def check_name(test: Callable) -> str:
    """`test_starts_as_the_base` -> `starts as the base`."""
    return test.__name__.removeprefix("test_").replace("_", " ")


def generated_part(page: str) -> str:
    """What lies between the markers of the page."""
    return page.partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n"


def with_generated_part(page: str, generated: str) -> str:
    """The page with another text between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost one of its markers.\n  Put them back: {BEGIN.strip()} and {END.strip()}.")
    return f"{before}{begin}\n{generated}\n{end}{after}"


def without_versions(generated: str) -> str:
    """The generated text without the line that names versions: other versions may well find the same."""
    return "\n".join(line for line in generated.splitlines() if not line.startswith(_VERSIONS))


def _count(outcomes: list[str]) -> str:
    applicable = [outcome for outcome in outcomes if outcome != "skipped"]
    return f"{applicable.count('passed')} of {len(applicable)}" if applicable else "–"


def _sign(outcome: str) -> str:
    return {"passed": "✓", "skipped": "–"}.get(outcome, "✗")


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."


def _read(generated: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    """What `Outcomes.render` wrote: the sign of each cell, and the text of its note or nothing."""
    *tables, listed = generated.split("\n### ")[1:]
    notes = {
        number.translate(_SUPERSCRIPT): text for number, text in re.findall(r"^(\d+)\. (.*)$", listed, re.MULTILINE)
    }
    cells = {}
    for text in tables:
        family, *lines = text.splitlines()
        (_, *methods), _, *rows = (line[2:-2].split(" | ") for line in lines if line)
        for check, *signs in rows:
            for method, sign in zip(methods, signs, strict=True):
                cells[family, method, check] = sign[0], notes.get(sign[1:], "")
    return cells


def cell(outcome: str, reason: str, notes: dict[str, str]) -> str:
    if not reason:
        return _sign(outcome)
    return _sign(outcome) + notes.setdefault(reason, str(len(notes) + 1)).translate(_SUPERSCRIPT)


def table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

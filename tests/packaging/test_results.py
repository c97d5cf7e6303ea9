"""The README, docs/results.md and docs/tasks.md say what the committed results say."""

import csv
import re
import statistics
from pathlib import Path

import pytest

from ssmtune.methods import METHODS

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "e2e-mamba-5m" / "report.md"
PROBES = ROOT / "benchmarks" / "results" / "probes" / "answers.md"
STUDY = ROOT / "benchmarks" / "results" / "study" / "results.csv"
HEADLINES = {
    "E2E": ("e2e", "bleu"),
    "WebNLG": ("webnlg", "bleu"),
    "SST-2": ("sst2", "accuracy"),
    "RTE": ("rte", "accuracy"),
}


def tables(text: str, header: str) -> list[dict[str, dict[str, str]]]:
    """Return the rows of every table whose header begins so: cells by the column's title, by the first cell."""
    return [table(header + part) for part in text.split(header)[1:]]


def table(text: str) -> dict[str, dict[str, str]]:
    lines = text.split("\n\n")[0].splitlines()
    titles, _, *rows = ([cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(titles[1:], cells[1:], strict=True)) for cells in rows}


def rounded(cell: str) -> str:
    return " ± ".join(f"{float(number):.1f}" for number in re.findall(r"-?[\d.]+", cell))


def test_results_of_e2e():
    if not REPORT.is_file():
        pytest.skip("needs a checkout")
    (shown,) = tables((ROOT / "README.md").read_text(), "| method | BLEU |")
    measured = tables(REPORT.read_text(), "| method |")[0]
    assert len(shown) == 6
    for name, cells in shown.items():
        (row,) = [row for method, row in measured.items() if name.startswith(method)]
        assert cells["BLEU"] == rounded(row["BLEU"])
        assert cells["ROUGE-L"] == rounded(row["ROUGE-L"]).split(" ± ")[0]
        assert cells["trainable"] == row["trainable"]


def test_results_of_the_study():
    if not STUDY.is_file():
        pytest.skip("needs a checkout")
    titles = {"base": "Base model, not tuned"} | {name: method.title for name, method in METHODS.items()}
    runs: dict[tuple[str, str, str], list[float]] = {}
    for row in csv.DictReader(STUDY.open()):
        place = f"{row['model']}, {row['task']}, {row['metric']}", titles[row["method"]]
        runs.setdefault(place, []).append(float(row["value"]))
    shown = tables((ROOT / "docs" / "results.md").read_text(), "| method |")
    assert len(shown) == 2 and all(len(rows) >= 8 for rows in shown)
    for method, cells in (row for rows in shown for row in rows.items()):
        for title, cell in cells.items():
            model, task = title.split(", ")
            values = runs.get((f"{model}, {', '.join(HEADLINES[task])}", method))
            assert cell == ("–" if values is None else written(values)), (method, title)


def test_results_of_the_probes():
    if not PROBES.is_file():
        pytest.skip("needs a checkout")
    shown = (ROOT / "docs" / "tasks.md").read_text().partition("What came out")[2]
    answers = table(PROBES.read_text()).values()
    held = [answer["came out"] for answer in answers].count("yes")
    assert f"{held} of the {len(answers)} known answers" in shown
    numbers = set(re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", shown))
    assert numbers and numbers <= {rounded(answer["exact match % (seeds)"].split(" (")[0]) for answer in answers}


def written(values: list[float]) -> str:
    numbers = [statistics.mean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
    return " ± ".join(f"{number:.1f}" for number in numbers)

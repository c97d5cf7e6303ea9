"""The README says what the committed results say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "e2e-mamba-5m" / "report.md"


def table(text: str, header: str) -> dict[str, dict[str, str]]:
    """Return the rows of the first table whose header begins so: cells by the column's title, by the first cell."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    titles, _, *rows = ([cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(titles[1:], cells[1:], strict=True)) for cells in rows}


def rounded(cell: str) -> str:
    return " ± ".join(f"{float(number):.1f}" for number in re.findall(r"-?[\d.]+", cell))


def test_results_of_e2e():
    if not REPORT.is_file():
        pytest.skip("needs a checkout")
    shown = table((ROOT / "README.md").read_text(), "| method | BLEU |")
    measured = table(REPORT.read_text(), "| method |")
    assert len(shown) == 6
    for name, cells in shown.items():
        (row,) = [row for method, row in measured.items() if name.startswith(method)]
        assert cells["BLEU"] == rounded(row["BLEU"])
        assert cells["ROUGE-L"] == rounded(row["ROUGE-L"]).split(" ± ")[0]
        assert cells["trainable"] == row["trainable"]

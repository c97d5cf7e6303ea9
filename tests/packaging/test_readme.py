"""The README says what the committed results say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "e2e-mamba-5m" / "report.md"


def table(text: str, header: str) -> dict[str, list[str]]:
    """Return the cells of each row of the first table whose header begins so, by the name in its first cell."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in rows}


def rounded(cell: str) -> str:
    return " ± ".join(f"{float(number):.1f}" for number in re.findall(r"-?[\d.]+", cell))


def test_results_of_e2e():
    if not REPORT.is_file():
        pytest.skip("needs a checkout")
    shown = table((ROOT / "README.md").read_text(), "| method | BLEU |")
    measured = table(REPORT.read_text(), "| method |")
    assert len(shown) == 6
    for name, (bleu, rouge, parameters) in shown.items():
        (row,) = [cells for method, cells in measured.items() if name.startswith(method)]
        assert bleu == rounded(row[0])
        assert rouge == rounded(row[3]).split(" ± ")[0]
        assert parameters == row[4]

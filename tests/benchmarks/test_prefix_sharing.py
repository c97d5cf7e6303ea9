import csv
from pathlib import Path

import pytest

from benchmarks import prefix_sharing

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "sharing" / "prefixes.csv"


@pytest.mark.parametrize("architecture, method", [("Mamba", "state-offset"), ("GPTNeoX", "full")])
def test_both_ways_run(architecture, method):
    rows = prefix_sharing.compare(architecture, method, quick=True)
    assert [row["way"] for row in rows] == ["repeated", "shared"]


def test_a_wrong_gradient_has_no_speed(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "shared_prefix_logits", lambda *args: 1.01 * repeated(*args))
    repeated = prefix_sharing.repeated_prefix_logits
    with pytest.raises(RuntimeError, match="A wrong result has no speed"):
        prefix_sharing.compare("Mamba", "full", quick=True)


def test_one_prompt_is_faster_than_two():
    with STORED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["way"] == "shared"]
    assert rows and {(row["model"], row["method"]) for row in rows} <= set(prefix_sharing.CASES)
    for row in rows:
        assert float(row["speedup"]) >= 1.5, row["model"]

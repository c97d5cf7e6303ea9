import csv
from pathlib import Path

import pytest

from benchmarks.optimizer_memory import METHODS, OPTIMIZERS, one_step

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "memory" / "optimizers.csv"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_of_each_runs(optimizer):
    assert list(one_step("state-offset", optimizer, 1, 32)) == [None]


def test_mezo_takes_the_memory_of_inference():
    with STORED.open(newline="") as file:
        found = {(row["method"], row["optimizer"]): int(row["bytes"]) for row in csv.DictReader(file)}
    assert len(found) == len(METHODS) * len(OPTIMIZERS)
    for method in METHODS:
        assert found[method, "mezo"] < 1.5 * found[method, "inference"]
        assert found[method, "mezo"] < found[method, "adamw"] / 3

import csv
from pathlib import Path

import pytest

from benchmarks.long_inputs import CASES, LENGTHS, one_step

STORED = Path(__file__).parents[2] / "benchmarks" / "results" / "memory" / "long-inputs.csv"


@pytest.mark.parametrize("gradients", ["whole", "exact", "truncated"])
def test_a_step_of_each_runs(gradients):
    assert list(one_step("state-offset", 40, gradients, 16)) == [None]


def test_the_memory_of_a_step_is_that_of_a_chunk():
    with STORED.open(newline="") as file:
        rows = {
            (row["method"], int(row["length"]), row["gradients"]): int(row["bytes"]) for row in csv.DictReader(file)
        }
    assert rows.keys() <= set(CASES) and LENGTHS[-1] in {length for _, length, _ in rows}
    in_chunks = {case: size for case, size in rows.items() if case[-1] != "whole"}
    # What is kept between chunks is all that grows: far below the texts, and the 8 GiB of a small machine.
    assert max(in_chunks.values()) < 2**29

import itertools
import json

import numpy as np
import pytest

from ssmtune.bootstrap import bootstrap_means, paired_differences
from ssmtune.cells import CellStore
from ssmtune.summary import summarize
from ssmtune.tasks.terms import Terms, mean_terms


def test_draws_of_a_tiny_case_are_those_of_the_enumeration():
    first, second = [3.0, 1.0, 8.0], [1.0, 2.0, 2.0]
    every = sorted(np.mean([first[i] - second[i] for i in chosen]) for chosen in itertools.product(range(3), repeat=3))
    runs = {"a": {0: mean_terms(first)}, "b": {0: mean_terms(second)}}
    found = paired_differences(runs, draws=20000)["a", "b"]
    assert found.mean == pytest.approx(7 / 3)
    # among the 27 equally likely draws
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5], method="inverted_cdf")))
    share = sum(value <= 0 for value in every) / 27
    assert found.p == pytest.approx(2 * share, rel=0.15)


def test_seeds_are_drawn_too():
    # no spread over examples: all of it is that of two seeds, which draws of 2 give as 1:2:1
    drawn = bootstrap_means([mean_terms([0.0] * 5), mean_terms([1.0] * 5)], draws=8000)
    assert drawn[0] == 0.5
    values, counts = np.unique(drawn[1:], return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0] and (counts / 8000).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_pairs_of_examples_cancel_what_they_share():
    rng = np.random.default_rng(1)
    hard = rng.normal(50, 30, 400)
    runs = {"a": {s: mean_terms(hard + 1) for s in range(3)}, "b": {s: mean_terms(hard) for s in range(3)}}
    found = paired_differences(runs)["a", "b"]
    assert found.low == pytest.approx(1, abs=1e-3) and found.high == pytest.approx(1, abs=1e-3)
    assert found.p == pytest.approx(2 / 2001)


def test_methods_that_are_alike_are_not_told_apart_and_holm_adjusts():
    rng = np.random.default_rng(0)
    runs = {name: {s: mean_terms(rng.integers(0, 2, 300) * 100) for s in range(3)} for name in "abc"}
    runs["d"] = {s: mean_terms([100.0] * 300) for s in range(3)}
    found = paired_differences(runs)
    assert all(found[pair].low < 0 < found[pair].high for pair in [("a", "b"), ("a", "c"), ("b", "c")])
    assert found["a", "d"].p == pytest.approx(2 / 2001) and found["a", "d"].adjusted == pytest.approx(6 * 2 / 2001)
    ordered = sorted(found.values(), key=lambda each: each.p)
    assert all(first.adjusted <= second.adjusted <= 1 for first, second in itertools.pairwise(ordered))
    assert found["a", "d"].reversed().mean == -found["a", "d"].mean


def test_only_shared_seeds_count_and_infinite_metrics_are_left_out():
    diverged = Terms("perplexity", np.array([[2000.0, 1.0]] * 4, dtype=np.float32))
    runs = {
        "a": {0: mean_terms([1.0, 2.0]), 1: mean_terms([5.0, 5.0])},
        "b": {1: mean_terms([4.0, 4.0]), 2: mean_terms([0.0, 0.0])},
        "c": {3: mean_terms([0.0, 0.0])},
        "d": {1: diverged},
    }
    found = paired_differences(runs)
    assert list(found) == [("a", "b")] and found["a", "b"].mean == 1


def test_a_summary_has_all_pairs(fake):
    out = fake({"lora": [50, 50], "state-offset": [75, 75], "full": [25, 25]})
    answers = {"lora": [100, 100, 0, 0], "state-offset": [100, 100, 100, 0], "full": [0, 100, 0, 0]}
    store = CellStore(out / "cells")
    for file in (out / "cells" / "final").iterdir():
        record = json.loads(file.read_text())
        record["terms"] = mean_terms(np.tile(answers[record["cell"]["method"]], 100)).packed()
        file.write_text(json.dumps(record))
    assert len(list(store.records())) == 1 + 3 * 3 + 6
    [task] = summarize(out).tasks
    assert list(task.pairs) == [("state-offset", "lora"), ("state-offset", "full"), ("lora", "full")]
    rows = {row.name: row for row in task.rows}
    assert rows["state-offset"].bootstrap.mean == 25 and rows["full"].bootstrap.mean == -25
    assert rows["full"].bootstrap.high < 0 < rows["state-offset"].bootstrap.low
    assert rows["lora"].bootstrap is None and rows["base"].bootstrap is None

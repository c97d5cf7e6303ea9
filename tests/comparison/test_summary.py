import math

import pytest

from ssmtune.config import ConfigError
from ssmtune.spread import Spread, student_t
from ssmtune.summary import summarize


@pytest.mark.parametrize(
    "degrees, point", [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (31, 2.040), (60, 2.000), (1000, 1.962)]
)
def test_student_t_is_the_tabulated_point(degrees, point):
    assert student_t(degrees) == pytest.approx(point, abs=6e-4)


def test_spread_of_known_values():
    spread = Spread((60.0, 62.0, 67.0))
    assert spread.mean == pytest.approx(63.0)
    assert spread.deviation == pytest.approx(math.sqrt(13.0))
    assert spread.interval == pytest.approx(4.303 * math.sqrt(13.0 / 3))
    assert Spread((60.0,)).deviation is None and Spread((60.0,)).interval is None
    assert Spread((60.0, math.inf)).deviation is None


def test_rows_hold_the_statistics_of_the_cells(fake):
    out = fake({"lora": [60, 62, 67], "state-offset": [61, 64, 70], "prompt-tuning": [30, 31, 32]}, base=12.5)
    task = summarize(out).tasks[0]
    rows = {row.name: row for row in task.rows}
    assert list(rows) == ["base", "lora", "state-offset", "prompt-tuning"]
    assert rows["lora"].scores.values == (60, 62, 67)
    assert task.reference == "lora" and rows["lora"].difference is None
    assert rows["state-offset"].difference.values == (1, 2, 3)
    assert rows["state-offset"].difference.interval == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert rows["lora"].lr == 0.3 and not rows["lora"].at_edge
    assert rows["lora"].search == pytest.approx({0.1: 2.2, 0.3: 2.0, 0.9: 2.6})
    assert rows["lora"].curves[1] == [(0, 3.0), (50, 2.6), (100, 2.1)]
    # A random prompt does not start as the base does.
    assert rows["prompt-tuning"].curves[1] == [(50, 2.6), (100, 2.1)]
    assert [row.name for row in task.ranked()] == ["state-offset", "lora", "prompt-tuning", "base"]


def test_pareto_front_holds_what_nothing_smaller_beats(fake):
    out = fake(
        {
            "full": [70, 70],
            "lora": [60, 60],
            "state-offset": [65, 65],
            "initial-state": [61, 61],
            "prompt-tuning": [30, 30],
            "state-offset-y": [40, 40],
        }
    )
    assert [row.name for row in summarize(out).tasks[0].pareto()] == ["state-offset-y", "state-offset", "full"]


def test_pareto_front_where_lower_is_better(fake):
    out = fake(
        {"full": [20, 20], "lora": [21, 21], "state-offset": [25, 25], "state-offset-y": [24, 24]},
        base=40.0,
        metric="perplexity",
        higher=False,
    )
    task = summarize(out).tasks[0]
    assert [row.name for row in task.pareto()] == ["state-offset-y", "lora", "full"]
    assert task.ranked()[0].name == "full"


def test_without_lora_the_best_is_the_reference(fake):
    task = summarize(fake({"state-offset": [60, 61], "full": [70, 72]})).tasks[0]
    assert task.reference == "full"
    assert task.rows[1].difference.values == (-10, -11)


def test_failures_and_infinities_are_rows(fake):
    out = fake({"lora": [math.inf, 30.0]}, metric="perplexity", higher=False, failed=["full"])
    task = summarize(out).tasks[0]
    lora, full = task.rows[1:]
    assert full.scores is None and full.errors == ["full <broke>\nat once"]
    assert lora.scores.values == (math.inf, 30.0) and lora.scores.deviation is None
    assert [row.name for row in task.ranked()] == ["base"]


def test_cells_of_other_data_do_not_count(fake):
    out = fake({"lora": [60, 62]})
    file = out / "cells" / "final" / "made-up--lora--final-seed1.json"
    file.write_text(file.read_text().replace('"task": "t"', '"task": "of another Python"'))
    assert summarize(out).tasks[0].rows[1].scores.values == (60,)


def test_a_directory_without_a_comparison_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"is not the directory of a comparison.*comparison\.json does not exist"):
        summarize(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        summarize(tmp_path)

from pathlib import Path

import pytest

from benchmarks import study

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "study"


def test_methods_are_those_that_fit_the_model():
    mamba, transformer = study.fitting_methods("mamba-5m"), study.fitting_methods("gpt-neox-5m")
    assert {"full", "lora", "prompt-tuning", "prefix-tuning"} <= set(mamba) & set(transformer)
    assert {"state-offset", "initial-state"} <= set(mamba) - set(transformer)


def test_budgets_are_valid():
    config = study.comparison("mamba-5m", study.TASKS, ["lora"], "data")
    config.check()
    assert [config.final_steps(task) for task in study.TASKS] == [120, 120, 480, 120]


def test_the_stored_report_is_that_of_the_stored_runs(tmp_path, capsys):
    if not RESULTS.is_dir():
        pytest.skip("needs a checkout")
    assert study.main(["--out", str(RESULTS), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "results.csv").read_text() == (RESULTS / "results.csv").read_text()
    assert (tmp_path / "mamba-5m" / "comparison.json").is_file()

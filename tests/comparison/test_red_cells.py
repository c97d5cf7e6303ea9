"""A method that cannot be trained, or fails a check, is a row that says so and has no score."""

import dataclasses

import pytest

from ssmtune import cell_runs
from ssmtune.comparison import run_comparison
from ssmtune.prechecks import Check
from ssmtune.summary import summarize


def rows(out):
    (task,) = summarize(out).tasks
    return {row.name: row for row in task.rows}, [row.name for row in task.ranked()]


def test_a_method_that_does_not_fit_the_model_is_a_row(small, tiny_transformer, tmp_path):
    methods = ["lora", "prefix-tuning", "state-offset"]
    run_comparison(dataclasses.replace(small, model=str(tiny_transformer), methods=methods, seeds=1), tmp_path / "out")
    found, ranked = rows(tmp_path / "out")
    assert sorted(ranked) == ["base", "lora", "prefix-tuning"]
    assert found["state-offset"].scores is None
    (error,) = found["state-offset"].errors
    assert "'state-offset' does not apply to LlamaForCausalLM: it has no recurrent mixer" in error


@pytest.mark.parametrize("failing", ["left padding", "save and load"])
def test_a_method_that_fails_a_check_is_not_trained(small, tmp_path, monkeypatch, failing):
    trained, train, run_prechecks = [], cell_runs.train, cell_runs.run_prechecks

    def broken(model, base, tokenizer, method, *args):
        checks = run_prechecks(model, base, tokenizer, method, *args)
        return [
            Check(check.name, False, "it is broken") if (method.name, check.name) == ("lora", failing) else check
            for check in checks
        ]

    def watched(model, *args, **kwargs):
        trained.append(model.active_peft_config.peft_type)
        return train(model, *args, **kwargs)

    monkeypatch.setattr(cell_runs, "run_prechecks", broken)
    monkeypatch.setattr(cell_runs, "train", watched)
    run_comparison(dataclasses.replace(small, seeds=1), tmp_path / "out")
    found, ranked = rows(tmp_path / "out")
    assert set(trained) == {"STATE_OFFSET"} and sorted(ranked) == ["base", "state-offset"]
    assert found["lora"].scores is None and found["lora"].checks == [f"{failing}: it is broken"]
    (error,) = found["lora"].errors
    assert error == f"lora was not trained on MambaForCausalLM, since it fails its check of {failing}: it is broken"

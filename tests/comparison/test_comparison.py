import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from ssmtune import cell_runs
from ssmtune.cells import Cell, CellStore
from ssmtune.comparison import ComparisonConfig, run_comparison
from ssmtune.config import ConfigError
from ssmtune.methods import CORE_METHODS, METHODS
from ssmtune.models import load_model
from ssmtune.stored_adapters import load_trained
from ssmtune.summary import summarize
from ssmtune.sweep import pick, planned_cells
from ssmtune.tasks import load_task


def records(out: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in (out / "cells").glob("*/*.json")}


def test_every_method_runs_on_an_equal_budget(small, tmp_path):
    # of the other methods tests/training asks all that a comparison needs
    methods = [*CORE_METHODS, "bitfit", "lora+state-offset"]
    config = dataclasses.replace(small, methods=methods, seeds=1)
    run_comparison(config, tmp_path / "out")
    found = records(tmp_path / "out")
    assert len(found) == 1 + len(methods) * (2 + 1)
    assert {record["status"] for record in found.values()} == {"success"}, [r["error"] for r in found.values()]
    for method in methods:
        search = [r for r in found.values() if r["cell"]["method"] == method and r["cell"]["stage"] == "search"]
        final = found[f"files--{method}--final-seed0"]
        assert [r["train_info"]["steps"] for r in search] == [2, 2] and final["train_info"]["steps"] == 3
        losses = {r["cell"]["lr"]: r["train_info"]["dev_loss"] for r in search}
        assert sorted(losses) == pytest.approx([METHODS[method].default_lr, METHODS[method].default_lr * 3])
        assert final["cell"]["lr"] == min(losses, key=losses.get)
        assert [check["passed"] for check in final["checks"]].count(False) == 0, final["checks"]
        assert final["train_info"]["file_size"] > 4 * final["train_info"]["num_trainable_params"] > 0
        assert final["metrics"]["test"]["perplexity"] > 1
    assert found["files--prompt-tuning--final-seed0"]["checks"][0]["passed"] is None


def test_saved_weights_are_those_that_were_measured(small, tmp_path):
    out = tmp_path / "out"
    run_comparison(dataclasses.replace(small, methods=["full", "state-offset", "prompt-tuning"], lr_factors=[1.0]), out)
    found, task = records(out), load_task("files", small.data_dir)
    for method in ("full", "state-offset", "prompt-tuning"):
        folder = out / "adapters" / "files" / method
        finals = [found[f"files--{method}--final-seed{seed}"] for seed in (0, 1)]
        best = min(finals, key=lambda record: record["train_info"]["dev_loss"])
        assert json.loads((folder / "cell.json").read_text())["seed"] == best["cell"]["seed"]
        model, tokenizer = load_trained(str(folder))
        assert task.evaluate(model, tokenizer, task.test) == pytest.approx(best["metrics"]["test"], rel=1e-5)


def test_runs_do_not_leak_into_each_other(small, tmp_path):
    small = dataclasses.replace(small, seeds=1, lr_factors=[1.0])
    run_comparison(dataclasses.replace(small, methods=["full", "state-offset"]), tmp_path / "both")
    run_comparison(dataclasses.replace(small, methods=["state-offset"]), tmp_path / "alone")
    both, alone = records(tmp_path / "both"), records(tmp_path / "alone")
    for name, record in alone.items():
        assert both[name].get("metrics") == record.get("metrics")
        assert both[name]["train_info"]["dev_loss"] == record["train_info"]["dev_loss"]


def test_all_methods_see_the_same_batches(small, tmp_path, monkeypatch):
    seen = {}
    train = cell_runs.train

    def watched(model, tokenizer, examples, dev, settings, *args, **kwargs):
        batches = []
        seen.setdefault(settings.seed, []).append(batches)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model

        def keep(module, inputs, output):
            if module.training:
                batches.append(inputs[0].tolist())

        hook = base.get_input_embeddings().register_forward_hook(keep)
        try:
            return train(model, tokenizer, examples, dev, settings, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(cell_runs, "train", watched)
    config = dataclasses.replace(small, methods=["lora", "state-offset", "full"], lr_factors=[1.0])
    run_comparison(config, tmp_path / "out")
    # The last three: before them, a batch is used to look for tensors without gradient.
    orders = {seed: [batches[-3:] for batches in runs] for seed, runs in seen.items()}
    assert set(orders) == {0, 1} and all(len(runs) == 3 for runs in orders.values())
    for runs in orders.values():
        assert len(runs[0]) == 3 and all(run == runs[0] for run in runs)
    assert orders[0][0] != orders[1][0]


def test_finished_runs_are_not_run_again(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small = dataclasses.replace(small, seeds=1, methods=["state-offset"])
    run_comparison(small, out)
    before = {file: file.read_bytes() for file in (out / "cells").glob("*/*.json")}

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(cell_runs, "train", refuse)
    run_comparison(small, out)
    assert {file: file.read_bytes() for file in (out / "cells").glob("*/*.json")} == before


def test_methods_and_seeds_can_be_added(small, tmp_path):
    out = tmp_path / "out"
    small = dataclasses.replace(small, lr_factors=[1.0])
    run_comparison(dataclasses.replace(small, methods=["state-offset"], seeds=1), out)
    before = records(out)
    run_comparison(dataclasses.replace(small, methods=["state-offset-y"], seeds=2), out)
    after = records(out)
    assert before.items() <= after.items() and "files--state-offset-y--final-seed1" in after
    described = json.loads((out / "comparison.json").read_text())
    assert list(described["methods"]) == ["state-offset", "state-offset-y"] == described["config"]["methods"]


def test_tasks_have_steps_of_their_own(small, tmp_path):
    config = dataclasses.replace(small, tasks=["files", "docstring-package"], task_steps={"docstring-package": 9})
    finals = {cell.task: cell.steps for cell in planned_cells(config) if cell.stage == "final"}
    assert finals == {"files": 3, "docstring-package": 9}
    out = tmp_path / "out"
    small = dataclasses.replace(small, methods=["state-offset-y"], seeds=1, lr_factors=[1.0])
    run_comparison(dataclasses.replace(small, steps=2, task_steps={"files": 3}), out)
    run_comparison(small, out)  # the same steps, said in another way
    assert records(out)["files--state-offset-y--final-seed0"]["train_info"]["steps"] == 3
    assert [task.steps for task in summarize(out).tasks] == [3]


def test_an_interrupted_sweep_goes_on(small, tmp_path, monkeypatch):
    out, train, calls = tmp_path / "out", cell_runs.train, []
    small = dataclasses.replace(small, methods=["state-offset", "state-offset-y"], seeds=1)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(cell_runs, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(small, out)
    kept = records(out)
    assert len(kept) == 1 + 3
    run_comparison(small, out)
    assert len(calls) == 4 + (6 - 3)
    assert kept.items() <= records(out).items()


def test_a_failure_is_recorded_and_the_sweep_goes_on(small, tmp_path, monkeypatch):
    out, apply_method = tmp_path / "out", cell_runs.apply_method
    small = dataclasses.replace(small, seeds=1)

    def broken(model, name, *args, **kwargs):
        if name == "lora":
            raise RuntimeError("lora is broken today")
        return apply_method(model, name, *args, **kwargs)

    monkeypatch.setattr(cell_runs, "apply_method", broken)
    run_comparison(small, out)
    found = records(out)
    final = found["files--lora--final-seed0"]
    assert final["status"] == "failed" and "lora is broken today" in final["error"] and final["cell"]["lr"] is None
    assert found["files--state-offset--final-seed0"]["status"] == "success"
    # What failed is tried again, and only that.
    monkeypatch.setattr(cell_runs, "apply_method", apply_method)
    run_comparison(small, out)
    again = records(out)
    assert {record["status"] for record in again.values()} == {"success"}
    assert again["files--state-offset--final-seed0"] == found["files--state-offset--final-seed0"]


def test_one_diverging_rate_does_not_win_the_search():
    def searched(*losses):
        records = [{"status": "success", "error": None, "train_info": {"dev_loss": loss}} for loss in losses]
        failed = {"status": "failed", "error": "the loss became nan"}
        return [
            {**(failed if record["train_info"]["dev_loss"] == "failed" else record), "cell": {"lr": lr}}
            for lr, record in zip((0.1, 0.2, 0.4), records, strict=True)
        ]

    assert pick([0.1, 0.2, 0.4], searched(2.0, 1.5, None)) == (0.2, None)
    assert pick([0.1, 0.2, 0.4], searched("failed", "failed", 2.0)) == (0.4, None)
    lr, problem = pick([0.1, 0.2, 0.4], searched("failed", "failed", None))
    assert lr is None and "the loss became nan" in problem
    assert pick([0.1, 0.2, 0.4], searched(math.nan, 2.0, 1.5)) == (0.4, None)


def test_the_search_picks_by_the_mean_over_its_seeds():
    losses = {0.1: (1.0, 3.0), 0.2: (1.8, 1.8)}
    records = [
        {"status": "success", "error": None, "cell": {"lr": lr}, "train_info": {"dev_loss": loss}}
        for lr, seeds in losses.items()
        for loss in seeds
    ]
    assert pick([0.1, 0.2], records) == (0.2, None)


def test_another_comparison_in_the_directory_is_named(small, tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    small = dataclasses.replace(small, methods=["state-offset-y"], seeds=1, lr_factors=[1.0])
    run_comparison(small, out)
    other = dataclasses.replace(small, steps=5, batch_size=2)
    with pytest.raises(ConfigError, match="(?s)batch_size: 3 there, 2 now.*steps of files: 3 there, 5 now.*over"):
        run_comparison(other, out)
    moved = tmp_path / "moved"
    model, tokenizer = load_model(str(tiny_checkpoint))
    with torch.no_grad():
        model.lm_head.weight.add_(1e-3)
    model.save_pretrained(moved)
    tokenizer.save_pretrained(moved)
    with pytest.raises(ConfigError, match="weights of the model"):
        run_comparison(dataclasses.replace(small, model=str(moved)), out)
    (Path(small.data_dir) / "test.jsonl").write_text(json.dumps({"prompt": "new", "completion": "text"}))
    with pytest.raises(ConfigError, match="examples of files: other texts"):
        run_comparison(small, out)
    run_comparison(small, out, overwrite=True)
    assert records(out)["files--base"]["run_info"]["task"] == load_task("files", small.data_dir).fingerprint()


def test_a_directory_of_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty, and what it holds is not a comparison"):
        run_comparison(small, tmp_path / "out")
    with pytest.raises(ConfigError):
        run_comparison(small, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_config_problems_are_named_together():
    config = ComparisonConfig(
        methods=["lorra", "full", "full"], tasks=["e2"], seeds=0, lr_factors=[1.0, -1.0], task_steps={"e": 0}
    )
    with pytest.raises(ConfigError) as caught:
        config.check()
    message = str(caught.value)
    for part in (
        "'lorra' is unknown; did you mean 'lora'",
        "'e2' is unknown; did you mean 'e2e'",
        "full is given twice",
        "seeds: expected at least 1, got 0",
        "task_steps has 'e', which is none of the tasks",
        "steps of e: expected at least 1, got 0",
        "lr_factors: expected positive numbers",
    ):
        assert part in message


def test_a_cell_is_found_under_its_own_conditions_only(tmp_path):
    store, cell = CellStore(tmp_path), Cell("t", "lora", "search", 1e-3, 1000, 5)
    identity = cell.hash({"model": "a"})
    store.write(cell, {"hash": identity, "status": "success"})
    assert store.finished(cell, identity)["cell"]["lr"] == 1e-3
    assert store.finished(cell, cell.hash({"model": "b"})) is None
    assert dataclasses.replace(cell, steps=6).hash({"model": "a"}) != identity
    store.write(cell, {"hash": identity, "status": "failed"})
    assert store.finished(cell, identity) is None
    store.file(cell).write_text('{"format": 2, "cel')
    assert store.finished(cell, identity) is None and list(store.records()) == []

import dataclasses
import datetime
import json
import math

import pytest

from ssmtune import cell_runs
from ssmtune.comparison import run_comparison
from ssmtune.peft_results import accuracy_like
from ssmtune.tasks import load_task

# What the app of peft's method_comparison looks up in each result, and as what pandas has to take it.
# https://github.com/huggingface/peft/blob/main/method_comparison/processing.py
RUN_INFO = {"experiment_name": str, "total_time": float, "created_at": str, "peft_branch": str, "error_msg": str}
TRAIN_INFO = {
    "status": str,
    "accelerator_memory_reserved_avg": int,
    "accelerator_memory_max": int,
    "accelerator_memory_reserved_99th": int,
    "train_time": float,
    "file_size": int,
    "num_trainable_params": int,
    "num_total_params": int,
}
LAST_METRICS = {"test accuracy": float, "train loss": float, "train samples": int}
LAST_METRICS |= {"train total tokens": int, "forgetting": float}
PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes")


def fields(values, types):
    return {name: type(values[name]) for name in types}


def test_every_field_of_pefts_app_is_there(small, tmp_path, monkeypatch):
    apply_method = cell_runs.apply_method

    def one_fails(model, name, *args, **kwargs):
        if name == "bitfit":
            raise RuntimeError("bitfit is broken today")
        return apply_method(model, name, *args, **kwargs)

    monkeypatch.setattr(cell_runs, "apply_method", one_fails)
    methods = ["full", "lora", "prompt-tuning", "bitfit"]
    config = dataclasses.replace(small, methods=methods, seeds=1, lr_factors=[1.0], measures=["forgetting"])
    run_comparison(config, tmp_path / "out")
    # the app reads the files of one folder, all of them
    results = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out" / "cells" / "final").iterdir()}
    assert len(results) == 4
    types = {}
    for name, result in results.items():
        run_info, train_info, meta_info = (result[part] for part in ("run_info", "train_info", "meta_info"))
        types[name.split("--")[1]] = run_info["peft_config"] and run_info["peft_config"]["peft_type"]
        if "bitfit" in name:
            assert train_info["status"] == "failed" and run_info["error_msg"] == "bitfit is broken today"
            continue
        assert fields(run_info, RUN_INFO) == RUN_INFO and fields(train_info, TRAIN_INFO) == TRAIN_INFO
        assert train_info["status"] == "success" and datetime.datetime.fromisoformat(run_info["created_at"]).tzinfo
        assert run_info["train_config"]["model_id"] == small.model
        last = train_info["metrics"][-1]
        assert fields(last, LAST_METRICS) == LAST_METRICS
        assert last["train samples"] == small.steps * small.batch_size and 0 < last["test accuracy"] < 1
        assert last["train total tokens"] == train_info["metrics"][-2].get("tokens", last["train total tokens"])
        versions = meta_info["package_info"]
        assert all(versions[f"{package}-version"] is None or versions[f"{package}-version"] for package in PACKAGES)
        assert isinstance(meta_info["system_info"]["accelerator"], str)
    assert types == {"full": None, "lora": "LORA", "prompt-tuning": "PROMPT_TUNING", "bitfit": None}
    names = [result["run_info"]["experiment_name"] for result in results.values()]
    assert len(set(names)) == 4


def test_accuracy_like_is_a_share_and_higher_is_better(data_dir):
    task = load_task("files", data_dir)
    assert accuracy_like(4.0, task) == 0.25
    assert accuracy_like(85.0, dataclasses.replace(task, higher_is_better=True)) == pytest.approx(0.85)
    assert accuracy_like(math.inf, task) == 0

"""The fields that the app of peft's method_comparison reads, beside our own: it shows `cells/final` as its own results.

https://github.com/huggingface/peft/tree/main/method_comparison
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.cells import Cell
from ssmtune.models import portable_name
from ssmtune.tasks.task import Task

if TYPE_CHECKING:
    from ssmtune.comparison import ComparisonConfig

# The app reads their versions and takes null for what is not installed.
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def peft_fields(cell: Cell, record: Mapping[str, Any], task: Task, config: ComparisonConfig) -> dict[str, Any]:
    """A record with the fields of a result of peft's method_comparison added to run_info, train_info and meta_info.

    peft's results have one number for each run, "test accuracy" between 0 and 1, and one experiment name: here the
    headline metric as `accuracy_like` and METHOD/TASK-seedN. Its "forgetting" is ours: nats per token of held-out text.
    """
    record = dict(record)
    run_info = record["run_info"] | {
        "experiment_name": f"{cell.method}/{cell.task}-seed{cell.seed}",
        "peft_branch": "main",
        "peft_config": record.pop("peft_config", None),
        "error_msg": record["error"] or "",
        "train_config": {
            "model_id": config.model,
            "max_seq_length": task.max_length,
            "max_steps": cell.steps,
            **record.pop("train_config", {}),
        },
    }
    info = record.get("train_info", {}) | {"status": record["status"]}
    if record["status"] == "success" and cell.stage == "final":
        last = {
            "step": info["steps"],
            "test accuracy": accuracy_like(record["metrics"]["test"][task.metric], task),
            "train loss": info["train_loss"],
            "train samples": info["steps"] * config.batch_size,
            "train total tokens": info["total_tokens"],
        }
        if (forgetting := record.get("effects", {}).get("forgetting")) is not None:
            last["forgetting"] = forgetting["nats_per_token"]
        info["metrics"] = [*info["metrics"], last]
    return record | {"run_info": run_info, "train_info": info, "meta_info": _meta_info(record["meta_info"], cell)}


def peft_config(model) -> dict[str, Any] | None:
    """The configuration of a model's first adapter in plain JSON, or None for a model without."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    values = config.to_dict() | {"base_model_name_or_path": portable_name(config.base_model_name_or_path)}
    return json.loads(json.dumps(values, default=plain))


def accuracy_like(score: float, task: Task) -> float:
    """A score as a share of 1, higher is better: percent / 100, and the probability per token that a perplexity is."""
    if task.higher_is_better:
        return score / 100
    return 1 / score if score else math.inf


def _meta_info(environment: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    versions = environment["packages"]
    return dict(environment) | {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {cell.task: {"sha": None, "created_at": None}},
        "package_info": {f"{name}-version": versions.get(name) for name in PACKAGES}
        | {f"{name}-commit-hash": None for name in PACKAGES},
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": environment["device"],
        },
        "pytorch_info": torch.__config__.show(),
    }

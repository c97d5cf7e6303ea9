"""Runs any cell of a comparison: the base model and the tasks, loaded once in each process that runs some."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.cell_runs import TaskRuns
from ssmtune.cells import Cell
from ssmtune.disk_space import DiskFull, room_in
from ssmtune.effects.context import Context, read_text
from ssmtune.models import load_model
from ssmtune.peft_results import peft_fields
from ssmtune.run_directory import environment
from ssmtune.sweep_progress import SweepProgress
from ssmtune.tasks import load_task

if TYPE_CHECKING:
    from ssmtune.comparison import ComparisonConfig


class CellRunner:
    """Makes the record of one cell after the other; keeps nothing of one for the next.

    Args:
        out: the comparison's directory; trained weights are left there for the sweep to keep or drop.
        progress: told of the steps of a run.
    """

    def __init__(self, config: ComparisonConfig, out: Path, progress: SweepProgress | None = None):
        import torch

        self.config, self.out = config, out
        self.tasks = {name: load_task(name, config.data_dir, config.limit) for name in config.tasks}
        base, tokenizer = load_model(config.model)
        if torch.cuda.is_available():
            base.to("cuda")
        self.fingerprint = model_fingerprint(base)
        self.environment = environment()
        progress = progress or SweepProgress(enabled=False)
        text = read_text(config.text)
        other = load_task(config.ood_task, config.data_dir, config.limit) if config.ood_task else None
        self.runs = {
            name: TaskRuns(Context(task, base, tokenizer, text, other), config, out, progress.callback)
            for name, task in self.tasks.items()
        }

    def conditions(self, task: str) -> dict[str, Any]:
        """What decides a result besides its cell."""
        return {"model": self.fingerprint, **self.runs[task].conditions}

    def run(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell, successful or not.

        Raises:
            DiskFull: there is no room for the weights.
        """
        runs = self.runs[cell.task]
        began, created = time.monotonic(), now()
        try:
            with room_in(self.out):
                outcome = runs.measure_base() if cell.stage == "base" else runs.train(cell)
        except DiskFull:
            raise
        except Exception as error:  # noqa: BLE001 - a run may fail in any way, and the sweep must go on
            outcome = failure(str(error) or type(error).__name__)
            outcome |= {"traceback": traceback.format_exc(), "checks": runs.checks.get(cell.method, [])}
        return self.record(cell, outcome, created, time.monotonic() - began)

    def record(self, cell: Cell, outcome: Mapping[str, Any], created: str, seconds: float = 0.0) -> dict[str, Any]:
        """What is stored of a cell with this outcome."""
        conditions = self.conditions(cell.task)
        record = {
            "cell": asdict(cell),
            "hash": cell.hash(conditions),
            "status": "success",
            "error": None,
            "checks": [],
        } | dict(outcome)
        record["run_info"] = {"created_at": created, "total_time": seconds, **conditions}
        record["meta_info"] = self.environment
        return peft_fields(cell, record, self.tasks[cell.task], self.config)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def failure(error: str) -> dict[str, Any]:
    """The outcome of a cell that failed."""
    return {"status": "failed", "error": error}


def model_fingerprint(model) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:16]

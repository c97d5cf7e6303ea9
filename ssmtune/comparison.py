"""Methods x seeds on the same tasks, with the same number of steps and the same search for a learning rate.

Every method gets the same steps, batches and data order (which depends on the seed alone), and a search over as many
learning rates, around its own default. The rate of the lowest dev loss is picked; final runs are reported on test.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ssmtune.cells import FORMAT, Cell, CellStore
from ssmtune.config import ConfigError, nearest
from ssmtune.methods import CORE_METHODS, METHODS, get_method
from ssmtune.tasks import TASKS, load_task

# Search runs are seeded apart from the final ones: no final run repeats the draw that picked its learning rate.
SEARCH_SEED = 1000


@dataclass
class ComparisonConfig:
    """What to compare, and on which budget.

    Args:
        model: base model of all methods.
        tasks, methods, seeds: what is crossed; all three can grow later in the same directory.
        steps: optimizer steps of a final run.
        search_steps: optimizer steps of a run of the learning-rate search; a third of `steps` by default.
        lr_factors: the grid, as multiples of each method's default learning rate.
        search_seeds: runs per learning rate in the search.
        batch_size, warmup, autocast: as in TrainConfig.
        evaluations: dev losses along a final run.
        data_dir: for the tasks that read files.
        limit: at most so many examples per split.
    """

    model: str = "mamba-5m"
    tasks: list[str] = field(default_factory=lambda: ["docstring-package"])
    methods: list[str] = field(default_factory=lambda: list(CORE_METHODS))
    seeds: int = 3
    steps: int = 300
    search_steps: int | None = None
    # Upwards only: the default rates are those of thousands of steps on large models, and few steps on a small one want
    # rates many times as high, most of all for the state-based methods.
    lr_factors: list[float] = field(default_factory=lambda: [1.0, 8.0, 64.0])
    search_seeds: int = 1
    batch_size: int = 16
    warmup: float = 0.1
    autocast: bool = False
    evaluations: int = 5
    data_dir: str | None = None
    limit: dict[str, int] = field(default_factory=dict)

    @property
    def steps_of_search(self) -> int:
        return self.search_steps or max(1, self.steps // 3)

    def learning_rates(self, method: str) -> list[float]:
        """The grid of a method, to two digits."""
        default = get_method(method).default_lr
        return sorted(float(f"{default * factor:.2g}") for factor in self.lr_factors)

    def check(self) -> None:
        """Raises ConfigError with one line per problem."""
        problems = [f"method {n!r} is unknown{nearest(n, METHODS)}" for n in self.methods if n not in METHODS]
        tasks = f"; there are {', '.join(TASKS)}"
        problems += [f"task {n!r} is unknown{nearest(n, TASKS) or tasks}" for n in self.tasks if n not in TASKS]
        for key, values in (("methods", self.methods), ("tasks", self.tasks), ("lr_factors", self.lr_factors)):
            if not values:
                problems.append(f"{key} is empty")
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                problems.append(f"{key}: {', '.join(twice)} is given twice")
        for key in ("seeds", "steps", "steps_of_search", "search_seeds", "batch_size", "evaluations"):
            if getattr(self, key) < 1:
                problems.append(f"{key}: expected at least 1, got {getattr(self, key)}")
        if any(not (math.isfinite(factor) and factor > 0) for factor in self.lr_factors):
            problems.append(f"lr_factors: expected positive numbers, got {self.lr_factors}")
        if not 0 <= self.warmup <= 1:
            problems.append(f"warmup: expected a share between 0 and 1, got {self.warmup}")
        if problems:
            raise ConfigError("config is not valid:\n" + "\n".join(f"  {problem}" for problem in problems))


def run_comparison(config: ComparisonConfig, out: Path, *, overwrite: bool = False, progress=None) -> None:
    """Run what is missing of a comparison.

    Writes comparison.json, a JSON file per run in cells/, and each method's best weights in adapters/TASK/METHOD. Runs
    that are there and succeeded under the same conditions are not run again. A run that fails is recorded with its
    error, and the sweep goes on.

    Args:
        out: the comparison's directory.
        overwrite: start afresh where the directory holds another comparison.
        progress: a `SweepProgress`; None shows nothing.

    Raises:
        ConfigError: the configuration is not valid, or `out` holds a comparison under other conditions.
    """
    from ssmtune.sweep_progress import SweepProgress

    config.check()
    sweep = _Sweep(config, Path(out), overwrite, progress or SweepProgress(enabled=False))
    with sweep.progress:
        sweep.run()


class _Sweep:
    """One call of run_comparison: the base model, the tasks, and where results go."""

    def __init__(self, config: ComparisonConfig, out: Path, overwrite: bool, progress):
        import torch

        from ssmtune.comparison_directory import claim
        from ssmtune.models import load_model
        from ssmtune.run_directory import environment

        self.config, self.out, self.progress = config, out, progress
        self.store = CellStore(out / "cells")
        self.environment = environment()
        self.tasks = {name: load_task(name, config.data_dir, config.limit) for name in config.tasks}
        self.base, self.tokenizer = load_model(config.model)
        if torch.cuda.is_available():
            self.base.to("cuda")
        self.fingerprint = _model_fingerprint(self.base)
        claim(out, self._description(), overwrite)

    def _description(self) -> dict[str, Any]:
        """What comparison.json says."""
        tasks = {
            name: {
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "description": task.description,
                "choices": len(task.choices),
                "sizes": task.sizes(),
                "fingerprint": task.fingerprint(),
                "example": task.dev[0].prompt,
            }
            for name, task in self.tasks.items()
        }
        methods = {
            name: {
                "title": get_method(name).title,
                "kind": get_method(name).kind,
                "learning_rates": self.config.learning_rates(name),
            }
            for name in self.config.methods
        }
        config = asdict(self.config) | {"search_steps": self.config.steps_of_search}
        return {
            "format": FORMAT,
            "config": config,
            "model_fingerprint": self.fingerprint,
            "tasks": tasks,
            "methods": methods,
            "environment": self.environment,
        }

    def run(self) -> None:
        """Every task: the base, the search of every method, then the final runs seed by seed."""
        from ssmtune.cell_runs import TaskRuns

        config = self.config
        todo = [
            TaskRuns(task, self.base, self.tokenizer, config, self.out, self.progress) for task in self.tasks.values()
        ]
        for runs in todo:
            name = runs.task.name
            searches = [cell for method in config.methods for cell in self._search_cells(name, method)]
            finals = [self._final_cell(name, method, None, seed) for method, seed in self._final_order()]
            planned = [Cell(name, "base", "base"), *searches, *finals]
            self.progress.plan({cell: runs.cost(cell) for cell in planned})
        for runs in todo:
            self._run_task(runs)

    def _run_task(self, runs) -> None:
        name = runs.task.name
        self._run(Cell(name, "base", "base"), runs, runs.measure_base)
        picked = {}
        for method in self.config.methods:
            cells = self._search_cells(name, method)
            records = [self._run(cell, runs, lambda cell=cell: runs.train(cell)) for cell in cells]
            picked[method] = _pick(self.config.learning_rates(method), cells, records)
        for method, seed in self._final_order():
            lr, problem = picked[method]
            cell = self._final_cell(name, method, lr, seed)
            work = (lambda cell=cell: runs.train(cell)) if problem is None else (lambda problem=problem: _fail(problem))
            self._run(cell, runs, work)

    def _search_cells(self, task: str, method: str) -> list[Cell]:
        rates = self.config.learning_rates(method)
        if len(rates) == 1:
            return []
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.config.search_seeds)
        return [Cell(task, method, "search", lr, seed, self.config.steps_of_search) for lr in rates for seed in seeds]

    def _final_order(self) -> list[tuple[str, int]]:
        return [(method, seed) for seed in range(self.config.seeds) for method in self.config.methods]

    def _final_cell(self, task: str, method: str, lr: float | None, seed: int) -> Cell:
        return Cell(task, method, "final", lr, seed, self.config.steps)

    def _run(self, cell: Cell, runs, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored record of a cell, or that of running it now, successful or not."""
        conditions = {"model": self.fingerprint, **runs.conditions}
        identity = cell.hash(conditions)
        if (stored := self.store.finished(cell, identity)) is not None:
            self.progress.skipped(cell)
            return stored
        self.progress.started(cell)
        began = time.monotonic()
        record: dict[str, Any] = {
            "hash": identity,
            "status": "success",
            "error": None,
            "checks": [],
            "run_info": {"created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **conditions},
        }
        try:
            record |= work()
        except Exception as error:  # noqa: BLE001 - a run may fail in any way, and the sweep must go on
            message = str(error) or type(error).__name__
            record |= {"status": "failed", "error": message, "traceback": traceback.format_exc()}
            record["checks"] = runs.checks.get(cell.method, [])
        record["run_info"]["total_time"] = time.monotonic() - began
        record["meta_info"] = self.environment
        self.store.write(cell, record)
        self.progress.finished(cell, record)
        return record


def _pick(
    rates: Sequence[float], cells: Sequence[Cell], records: Sequence[dict[str, Any]]
) -> tuple[float | None, str | None]:
    """The learning rate of the lowest mean dev loss, or None and why there is none."""
    if not cells:
        return rates[0], None
    losses: dict[float, list[float]] = {lr: [] for lr in rates}
    for cell, record in zip(cells, records, strict=True):
        loss = record["train_info"]["dev_loss"] if record["status"] == "success" else None
        losses[cell.lr].append(math.inf if loss is None or math.isnan(loss) else loss)
    best = min(rates, key=lambda lr: statistics.mean(losses[lr]))
    if math.isinf(statistics.mean(losses[best])):
        errors = {record["error"] for record in records}
        if len(errors) == 1 and None not in errors:
            return None, errors.pop()
        first = next((record["error"] for record in records if record["error"]), "the dev loss is not finite")
        return None, f"no learning rate of the search gave a finite dev loss; the first problem: {first}"
    return best, None


def _fail(problem: str) -> dict[str, Any]:
    raise RuntimeError(problem)


def _model_fingerprint(model) -> str:
    """A hash of all weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:16]

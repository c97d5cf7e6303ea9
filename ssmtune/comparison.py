"""Methods x seeds on the same tasks, with the same number of steps and the same search for a learning rate.

Every method gets the same steps, batches and data order (which depends on the seed alone), and a search over as many
learning rates, around its own default. The rate of the lowest dev loss is picked; final runs are reported on test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.cells import FORMAT
from ssmtune.config import ConfigError, nearest
from ssmtune.effects import EFFECTS
from ssmtune.extensions import import_modules
from ssmtune.methods import CORE_METHODS, METHODS, get_method
from ssmtune.tasks import SPLITS, TASKS

if TYPE_CHECKING:
    from ssmtune.cell_runner import CellRunner
    from ssmtune.sweep_progress import SweepProgress


@dataclass
class ComparisonConfig:
    """What to compare, and on which budget.

    Args:
        model: base model of all methods.
        tasks, methods, seeds: what is crossed; all three can grow later in the same directory.
        steps: optimizer steps of a final run.
        task_steps: other numbers of them, by task.
        search_steps: optimizer steps of a run of the learning-rate search; by default a third of those of a final run.
        lr_factors: the grid, as multiples of each method's default learning rate.
        search_seeds: runs per learning rate in the search.
        batch_size, warmup, autocast: as in TrainConfig.
        evaluations: dev losses along a final run.
        measures: effects to measure besides the score, keys of EFFECTS.
        text: held-out text for them, a file of plain text or JSONL with a column `text`; by default one of 1,800 words
            that comes with ssmtune.
        ood_task: the task whose prompts `ood` has to tell from those of each task; pieces of the text by default.
        data_dir: for the tasks that read files.
        limit: at most so many examples per split.
        imports: modules that register methods and tasks of your own; imported with the configuration, in every process.
    """

    model: str = "mamba-5m"
    tasks: list[str] = field(default_factory=lambda: ["docstring-package"])
    methods: list[str] = field(default_factory=lambda: list(CORE_METHODS))
    seeds: int = 5
    steps: int = 300
    task_steps: dict[str, int] = field(default_factory=dict)
    search_steps: int | None = None
    # Upwards only: the default rates are those of thousands of steps on large models, and few steps on a small one want
    # rates many times as high, most of all for the state-based methods.
    lr_factors: list[float] = field(default_factory=lambda: [1.0, 8.0, 64.0])
    search_seeds: int = 2
    batch_size: int = 16
    warmup: float = 0.1
    autocast: bool = False
    evaluations: int = 5
    measures: list[str] = field(default_factory=lambda: list(EFFECTS))
    text: str | None = None
    ood_task: str | None = None
    data_dir: str | None = None
    limit: dict[str, int] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)

    def __post_init__(self):
        import_modules(self.imports)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def final_steps(self, task: str) -> int:
        return self.task_steps.get(task, self.steps)

    def steps_of_search(self, task: str) -> int:
        return self.search_steps or max(1, self.final_steps(task) // 3)

    def learning_rates(self, method: str) -> list[float]:
        """The grid of a method, to two digits."""
        default = get_method(method).default_lr
        return sorted(float(f"{default * factor:.2g}") for factor in self.lr_factors)

    def check(self) -> None:
        """Raises ConfigError with one line per problem."""
        problems = [f"method {n!r} is unknown{nearest(n, METHODS)}" for n in self.methods if n not in METHODS]
        tasks = f"; there are {', '.join(TASKS)}"
        problems += [f"task {n!r} is unknown{nearest(n, TASKS) or tasks}" for n in self.tasks if n not in TASKS]
        problems += [f"measure {n!r} is unknown{nearest(n, EFFECTS)}" for n in self.measures if n not in EFFECTS]
        if self.ood_task is not None and self.ood_task not in TASKS:
            problems.append(f"task {self.ood_task!r} is unknown{nearest(self.ood_task, TASKS) or tasks}")
        for key, values in (("methods", self.methods), ("tasks", self.tasks), ("lr_factors", self.lr_factors)):
            if not values:
                problems.append(f"{key} is empty")
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                problems.append(f"{key}: {', '.join(twice)} is given twice")
        for key, what, known in (("task_steps", "tasks", self.tasks), ("limit", "splits", SPLITS)):
            problems += [
                f"{key} has {n!r}, which is none of the {what}{nearest(n, known) or ': ' + ', '.join(known)}"
                for n in getattr(self, key)
                if n not in known
            ]
        counts = {key: getattr(self, key) for key in ("seeds", "steps", "search_seeds", "batch_size", "evaluations")}
        counts |= {f"steps of {task}": count for task, count in self.task_steps.items()}
        counts |= {f"limit of {split}": count for split, count in self.limit.items()}
        if self.search_steps is not None:
            counts["search_steps"] = self.search_steps
        problems += [f"{key}: expected at least 1, got {count}" for key, count in counts.items() if count < 1]
        if any(not (math.isfinite(factor) and factor > 0) for factor in self.lr_factors):
            problems.append(f"lr_factors: expected positive numbers, got {self.lr_factors}")
        if not 0 <= self.warmup <= 1:
            problems.append(f"warmup: expected a share between 0 and 1, got {self.warmup}")
        if problems:
            raise ConfigError("config is not valid:\n" + "\n".join(f"  {problem}" for problem in problems))


def fitting_methods(model: str, names: Iterable[str] = METHODS) -> list[str]:
    """Those of the methods that can train a model, by the names of both."""
    from ssmtune.models import empty_model

    empty = empty_model(model)
    return [name for name in names if METHODS[name].needs(empty) is None]


def run_comparison(
    config: ComparisonConfig,
    out: Path,
    *,
    overwrite: bool = False,
    progress: SweepProgress | None = None,
    processes: int = 1,
    ray: str | None = None,
) -> None:
    """Run what is missing of a comparison.

    Writes comparison.json, a JSON file per run in cells/, and each method's best weights in adapters/TASK/METHOD. Runs
    that are there and succeeded under the same conditions are not run again. A run that fails is recorded with its
    error, and the sweep goes on. The results do not depend on where and in what order the runs are made.

    Args:
        out: the comparison's directory.
        overwrite: start afresh where the directory holds another comparison.
        progress: a `SweepProgress`; None shows nothing.
        processes: how many runs are made at a time.
        ray: make them on a Ray cluster: its address, "auto" for the one this machine belongs to, "local" for a new
            one on this machine. `out` has to be a directory of all its machines.

    Raises:
        ConfigError: the configuration is not valid, `out` holds a comparison under other conditions, or another process
            is at work in it.
        DiskFull: a result could not be written; all others are stored.
    """
    from ssmtune.cell_runner import CellRunner
    from ssmtune.cell_workers import Processes, ThisProcess
    from ssmtune.comparison_directory import at_work_in, claim
    from ssmtune.sweep import Sweep
    from ssmtune.sweep_progress import SweepProgress

    config.check()
    if processes < 1:
        raise ConfigError(f"processes: expected at least 1, got {processes}.\n  Each makes one run at a time.")
    out, progress = Path(out).absolute(), progress or SweepProgress(enabled=False)
    runner = CellRunner(config, out, progress)
    with at_work_in(out), progress:
        claim(out, _description(runner), overwrite)
        if ray is not None:
            from ssmtune.ray_workers import RayWorkers

            workers = RayWorkers(runner, processes, ray)
        else:
            workers = Processes(runner, processes) if processes > 1 else ThisProcess(runner)
        try:
            Sweep(runner, workers, progress).run()
        finally:
            workers.close()


def _description(runner: CellRunner) -> dict[str, Any]:
    """What comparison.json says."""
    config = runner.config
    tasks = {
        name: {
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "description": task.description,
            "choices": len(task.choices),
            "sizes": task.sizes(),
            "steps": config.final_steps(name),
            "search_steps": config.steps_of_search(name),
            "fingerprint": task.fingerprint(),
            "example": task.dev[0].prompt,
        }
        for name, task in runner.tasks.items()
    }
    methods = {
        name: {
            "title": get_method(name).title,
            "kind": get_method(name).kind,
            "learning_rates": config.learning_rates(name),
        }
        for name in config.methods
    }
    return {
        "format": FORMAT,
        "config": asdict(config),
        "model_fingerprint": runner.fingerprint,
        "tasks": tasks,
        "methods": methods,
        "environment": runner.environment,
    }

"""The order of a comparison's cells: what is handed out next, and what becomes of each record.

A final run waits for the search of its method on its task, and for nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssmtune.best_weights import forget_incoming, keep_if_best
from ssmtune.cell_runner import CellRunner, failure, now
from ssmtune.cell_workers import Workers
from ssmtune.cells import Cell, CellStore
from ssmtune.disk_space import room_in
from ssmtune.sweep_progress import SweepProgress, in_words

if TYPE_CHECKING:
    from ssmtune.comparison import ComparisonConfig

# Search runs are seeded apart from the final ones: no final run repeats the draw that picked its learning rate.
SEARCH_SEED = 1000


def planned_cells(config: ComparisonConfig) -> list[Cell]:
    """All cells: of each task the base, the searches, then the final runs seed by seed, their rates still open."""
    cells = []
    for task in config.tasks:
        cells.append(Cell(task, "base", "base"))
        cells += [cell for method in config.methods for cell in search_cells(config, task, method)]
        cells += [
            Cell(task, method, "final", None, seed, config.final_steps(task))
            for seed in range(config.seeds)
            for method in config.methods
        ]
    return cells


def search_cells(config: ComparisonConfig, task: str, method: str) -> list[Cell]:
    """The search of one method on one task; none where there is but one rate."""
    rates = config.learning_rates(method)
    if len(rates) == 1:
        return []
    seeds = range(SEARCH_SEED, SEARCH_SEED + config.search_seeds)
    return [Cell(task, method, "search", lr, seed, config.steps_of_search(task)) for lr in rates for seed in seeds]


class Sweep:
    """One call of run_comparison."""

    def __init__(self, runner: CellRunner, workers: Workers, progress: SweepProgress):
        self.config, self.out, self.runner = runner.config, runner.out, runner
        self.workers, self.progress = workers, progress
        self.store = CellStore(self.out / "cells")
        self.records: dict[Cell, Mapping[str, Any]] = {}

    def run(self) -> None:
        """Run what is not stored yet.

        Raises:
            DiskFull: a result could not be written.
        """
        self.waiting, running = planned_cells(self.config), 0
        self.progress.plan({cell: self.runner.runs[cell.task].cost(cell) for cell in self.waiting})
        with room_in(self.out):
            forget_incoming(self.out)
            while True:
                while running < self.workers.slots and (cell := self._next()) is not None:
                    self.progress.started(cell)
                    self.workers.start(cell)
                    running += 1
                if not running:
                    break
                cell, record = self.workers.finished()
                running -= 1
                self._keep(cell, record)
            forget_incoming(self.out)

    def _next(self) -> Cell | None:
        """The first cell that can run now and has no result yet."""
        for planned in list(self.waiting):
            cell, problem = planned, None
            if planned.stage == "final":
                search = [self.records.get(cell) for cell in search_cells(self.config, planned.task, planned.method)]
                if None in search:
                    continue
                lr, problem = pick(self.config.learning_rates(planned.method), search)
                cell = Cell(planned.task, planned.method, "final", lr, planned.seed, planned.steps)
            self.waiting.remove(planned)
            if (stored := self.store.finished(cell, self._hash(cell))) is not None:
                self.records[cell] = stored
                self.progress.skipped(cell)
            elif problem is not None:
                self._keep(cell, self.runner.record(cell, failure(problem), now()))
            else:
                return cell
        return None

    def _keep(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Store a record, and its weights where they are the best of their method."""
        if record["hash"] != self._hash(cell):
            here = self.runner.conditions(cell.task)
            there = {key: record["run_info"].get(key) for key in here}
            raise RuntimeError(
                f"{in_words(cell)}: the worker has another base model or other examples than this process.\n"
                f"  {there} there, {here} here.\n"
                "  Give every machine the same model, data and Python."
            )
        if cell.stage == "final" and record["status"] == "success":
            keep_if_best(self.out, cell, record["train_info"]["dev_loss"])
        self.store.write(cell, record)
        self.records[cell] = record
        self.progress.finished(cell, record)

    def _hash(self, cell: Cell) -> str:
        return cell.hash(self.runner.conditions(cell.task))


def pick(rates: Sequence[float], records: Sequence[Mapping[str, Any]]) -> tuple[float | None, str | None]:
    """The rate of the lowest dev loss, averaged over the seeds of the search; or None, and why there is none."""
    if not records:
        return rates[0], None
    losses: dict[float, list[float]] = {lr: [] for lr in rates}
    for record in records:
        loss = record["train_info"]["dev_loss"] if record["status"] == "success" else None
        losses[record["cell"]["lr"]].append(math.inf if loss is None or math.isnan(loss) else loss)
    best = min(rates, key=lambda lr: statistics.mean(losses[lr]))
    if math.isinf(statistics.mean(losses[best])):
        errors = {record["error"] for record in records}
        if len(errors) == 1 and None not in errors:
            return None, errors.pop()
        first = next((record["error"] for record in records if record["error"]), "the dev loss is not finite")
        return None, f"no learning rate of the search gave a finite dev loss; the first problem: {first}"
    return best, None

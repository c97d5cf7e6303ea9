"""How a comparison shows where it is: a bar over the whole sweep on a terminal, one line per run anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback

from ssmtune.cells import Cell


class SweepProgress:
    """Prints each finished run with the time left for all of them.

    The estimate weighs runs by their work and divides by the speed so far; runs that were finished before do not count.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.bar = None
        self.planned: dict[tuple, float] = {}
        self.total = self.done = self.skipped_work = 0.0
        self.count = self.runs = 0
        self.began = time.monotonic()

    def __enter__(self) -> SweepProgress:
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {postfix}", dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def plan(self, costs: Mapping[Cell, float]) -> None:
        """Announce runs to come, with the work in each."""
        for cell, cost in costs.items():
            self.planned[_key(cell)] = cost
        self.total += sum(costs.values())
        self.runs += len(costs)
        if not self.count:
            self.began = time.monotonic()

    def started(self, cell: Cell) -> None:
        self._show(cell, 0.0)

    def skipped(self, cell: Cell) -> None:
        """A run that is finished since an earlier call."""
        self._advance(cell)
        self.skipped_work += self.planned[_key(cell)]

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        self._advance(cell)
        self.note(f"[{self.count}/{self.runs}] {in_words(cell)}: {_outcome(record)}, {self.left()}")
        self._show(cell, 0.0)

    def note(self, text: str) -> None:
        """Any line, without breaking the bar."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def callback(self, cell: Cell) -> TrainerCallback:
        return _Steps(self, cell)

    def left(self) -> str:
        work, seconds = self.done - self.skipped_work, time.monotonic() - self.began
        if work <= 0:
            return "time left unknown"
        remaining = seconds / work * max(0.0, self.total - self.done)
        return f"{timedelta(seconds=round(remaining))} left"

    def _advance(self, cell: Cell) -> None:
        self.count += 1
        self.done += self.planned[_key(cell)]

    def _show(self, cell: Cell, share: float) -> None:
        if self.bar is None:
            return
        done = self.done + share * self.planned[_key(cell)]
        self.bar.n = min(1.0, done / self.total) if self.total else 0.0
        self.bar.set_postfix_str(f"{self.count}/{self.runs} runs, {self.left()} · {in_words(cell)}")


class _Steps(TrainerCallback):
    """Moves the bar within a run."""

    def __init__(self, progress: SweepProgress, cell: Cell):
        self.progress, self.cell = progress, cell

    def on_step_end(self, args, state, control, **_: Any):
        self.progress._show(self.cell, state.global_step / max(1, state.max_steps))


def in_words(cell: Cell) -> str:
    """`docstring-package, lora, search, lr 2e-3, seed 1000`."""
    if cell.stage == "base":
        return f"{cell.task}, base model"
    rate = f", lr {cell.lr:.1e}" if cell.lr is not None else ""
    return f"{cell.task}, {cell.method}{rate}" + (", search" if cell.stage == "search" else f", seed {cell.seed}")


def _key(cell: Cell) -> tuple:
    # the learning rate of a final run is not known when it is planned
    return (cell.task, cell.method, cell.stage, cell.seed, cell.lr if cell.stage == "search" else None)


def _outcome(record: Mapping[str, Any]) -> str:
    seconds = record["run_info"]["total_time"]
    if record["status"] != "success":
        return f"FAILED after {seconds:.1f} s: {record['error'].splitlines()[0]}"
    loss = record["train_info"]["dev_loss"]
    text = "" if loss is None else f"dev loss {loss:.4f}"
    for name, value in list(record.get("metrics", {}).get("test", {}).items())[:1]:
        text += f", test {name} {value:.2f}"
    return f"{text}, {seconds:.1f} s"

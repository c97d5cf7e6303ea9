"""What the stored cells of a comparison say: one table for each task, and ranks over all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmtune.bootstrap import Difference, paired_differences
from ssmtune.cells import CellStore
from ssmtune.comparison_directory import read_description
from ssmtune.method_rows import MethodRow, base_row, finite, method_row
from ssmtune.ranks import Ranks, average_ranks
from ssmtune.spread import Spread
from ssmtune.tasks.terms import Terms

REFERENCE = "lora"


@dataclass
class TaskSummary:
    """All methods on one task.

    Args:
        rows: the base, then the methods in the order of the configuration.
        reference: the method that `difference` and `bootstrap` of the others are to.
        pairs: (first, second) -> how much higher the metric of the first is, over examples and seeds.
    """

    name: str
    metric: str
    higher_is_better: bool
    description: str
    choices: int
    sizes: dict[str, int]
    steps: int
    search_steps: int
    example: str
    rows: list[MethodRow]
    reference: str | None
    pairs: dict[tuple[str, str], Difference] = field(default_factory=dict)

    def ranked(self) -> list[MethodRow]:
        """Rows with a score, best first."""
        scored = [row for row in self.rows if row.scores is not None and math.isfinite(row.scores.mean)]
        return sorted(scored, key=lambda row: row.scores.mean, reverse=self.higher_is_better)

    def pareto(self) -> list[MethodRow]:
        """Methods that no other beats with as few trainable parameters, by their number."""
        front: list[MethodRow] = []
        for row in sorted((row for row in self.ranked() if row.trainable), key=lambda row: row.trainable):
            # ties in size: ranked() puts the better first
            better = not front or (row.scores.mean > front[-1].scores.mean) == self.higher_is_better
            if better and row.trainable != (front[-1].trainable if front else None):
                front.append(row)
        return front


@dataclass
class Summary:
    """A whole comparison, with the conditions under which it was made; `ranks` has the methods alone, not the base."""

    config: dict[str, Any]
    environment: dict[str, Any]
    tasks: list[TaskSummary]
    ranks: Ranks
    first_run: str
    last_run: str
    runs: int
    failed: int
    seconds: float


def summarize(out: Path) -> Summary:
    """Read comparison.json and the cells of `out`.

    Raises:
        ConfigError: `out` is not the directory of a comparison.
    """
    description = read_description(Path(out))
    # A cell of an older task or base is not part of the comparison that the directory describes now.
    known = {name: task["fingerprint"] for name, task in description["tasks"].items()}
    records = [
        record
        for record in CellStore(Path(out) / "cells").records()
        if record["run_info"].get("task") == known.get(record["cell"]["task"])
        and record["run_info"].get("model") == description["model_fingerprint"]
    ]
    created = sorted(record["run_info"]["created_at"] for record in records)
    tasks = [
        _task_summary(name, task, description, [r for r in records if r["cell"]["task"] == name])
        for name, task in description["tasks"].items()
    ]
    return Summary(
        config=description["config"],
        environment=description["environment"],
        tasks=tasks,
        ranks=average_ranks(
            {
                task.name: {
                    row.name: row.scores.mean if task.higher_is_better else -row.scores.mean
                    for row in task.ranked()
                    if row.name != "base"
                }
                for task in tasks
            }
        ),
        first_run=created[0] if created else "",
        last_run=created[-1] if created else "",
        runs=len(records),
        failed=sum(record["status"] != "success" for record in records),
        seconds=sum(record["run_info"]["total_time"] for record in records),
    )


def _task_summary(name: str, task: Mapping, description: Mapping, records: Sequence[Mapping]) -> TaskSummary:
    base = [record for record in records if record["cell"]["stage"] == "base"]
    start = next((record["train_info"]["dev_loss"] for record in base if record["status"] == "success"), None)
    rows = [base_row(base[0], task["metric"])] if base else []
    for method, about in description["methods"].items():
        own = [record for record in records if record["cell"]["method"] == method]
        rows.append(method_row(method, about, own, task["metric"], start))
    summary = TaskSummary(
        name=name,
        metric=task["metric"],
        higher_is_better=task["higher_is_better"],
        description=task["description"],
        choices=task["choices"],
        sizes=task["sizes"],
        steps=task["steps"],
        search_steps=task["search_steps"],
        example=task["example"],
        rows=rows,
        reference=None,
    )
    for row in rows:
        if row.decode_ms is not None and base and rows[0].decode_ms:
            row.decode_ratio = row.decode_ms / rows[0].decode_ms
    tuned = [row for row in summary.ranked() if row.name != "base"]
    reference = next((row for row in tuned if row.name == REFERENCE), tuned[0] if tuned else None)
    if reference is not None:
        summary.reference = reference.name
        by_seed = {record["cell"]["method"]: {} for record in records}
        for record in records:
            if record["cell"]["stage"] == "final" and record["status"] == "success":
                by_seed[record["cell"]["method"]][record["cell"]["seed"]] = record["metrics"]["test"][task["metric"]]
        for row in tuned:
            mine, theirs = by_seed[row.name], by_seed[reference.name]
            pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys()) if finite(mine[seed])]
            if row is not reference and pairs:
                row.difference = Spread(tuple(pairs))
        summary.pairs = paired_differences(_terms(records, [row.name for row in tuned]))
        for row in tuned:
            row.bootstrap = summary.pairs.get((row.name, reference.name))
            if (against := summary.pairs.get((reference.name, row.name))) is not None:
                row.bootstrap = against.reversed()
    return summary


def _terms(records: Sequence[Mapping], methods: Sequence[str]) -> dict[str, dict[int, Terms]]:
    """Method -> seed -> what each test example adds to the metric, of the final runs that have it."""
    found: dict[str, dict[int, Terms]] = {method: {} for method in methods}
    for record in records:
        cell = record["cell"]
        if cell["stage"] == "final" and cell["method"] in found and record.get("terms"):
            found[cell["method"]][cell["seed"]] = Terms.unpacked(record["terms"])
    return found

"""What the stored cells of a comparison say: one row per method, with statistics over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmtune.bootstrap import Difference, paired_differences
from ssmtune.cells import CellStore
from ssmtune.comparison_directory import read_description
from ssmtune.ranks import Ranks, average_ranks
from ssmtune.tasks.terms import Terms

# 97.5 % points of Student's t for 1..30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
REFERENCE = "lora"


@dataclass(frozen=True)
class Spread:
    """Some values, one per seed.

    The standard deviation, and the half-width of the 95 % interval of the mean, are None where one value or an infinite
    one leaves them undefined.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return statistics.stdev(self.values)

    @property
    def interval(self) -> float | None:
        n, deviation = len(self.values), self.deviation
        return None if deviation is None else student_t(n - 1) * deviation / math.sqrt(n)


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution; from a table, then by the first terms of its expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass
class MethodRow:
    """One method on one task.

    Args:
        scores: the headline metric on test, one value per seed; None if no seed has finished.
        others: the other test metrics.
        difference: of `scores` to the reference method's, by seed; None for the reference itself.
        bootstrap: the same difference over examples and seeds; None where terms are not stored.
        lr: the picked learning rate; at_edge says that it is the least or greatest of the grid.
        search: learning rate -> dev loss of the search.
        curves: per seed, [(step, dev loss)], the base's at step 0 included where the method starts there.
        checks: those of the pre-checks that failed, in words.
        errors: of the runs that failed.
    """

    name: str
    title: str
    kind: str
    scores: Spread | None = None
    others: dict[str, Spread] = field(default_factory=dict)
    dev_loss: Spread | None = None
    difference: Spread | None = None
    bootstrap: Difference | None = None
    lr: float | None = None
    at_edge: bool = False
    search: dict[float, float | None] = field(default_factory=dict)
    curves: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    trainable: int | None = None
    total: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    file_size: int | None = None
    decode_ms: float | None = None
    checks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


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
    rows = [_base_row(base[0], task["metric"])] if base else []
    for method, about in description["methods"].items():
        own = [record for record in records if record["cell"]["method"] == method]
        rows.append(_method_row(method, about, own, task["metric"], start))
    summary = TaskSummary(
        name=name,
        metric=task["metric"],
        higher_is_better=task["higher_is_better"],
        description=task["description"],
        choices=task["choices"],
        sizes=task["sizes"],
        example=task["example"],
        rows=rows,
        reference=None,
    )
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
            pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys()) if _finite(mine[seed])]
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


def _base_row(record: Mapping, metric: str) -> MethodRow:
    row = MethodRow("base", "Base model, not tuned", "base", trainable=0)
    if record["status"] != "success":
        row.errors.append(record["error"])
        return row
    _add_metrics(row, [record], metric)
    info = record["train_info"]
    row.dev_loss = Spread((info["dev_loss"],)) if _finite(info["dev_loss"]) else None
    row.total, row.decode_ms = info["num_total_params"], info["decode_ms_per_token"]
    return row


def _method_row(method: str, about: Mapping, records: Sequence[Mapping], metric: str, start: float | None) -> MethodRow:
    row = MethodRow(method, about["title"], about["kind"])
    finals = [record for record in records if record["cell"]["stage"] == "final"]
    done = [record for record in finals if record["status"] == "success"]
    row.errors = list(dict.fromkeys(record["error"] for record in records if record["status"] != "success"))
    checks = next((record["checks"] for record in records if record["checks"]), [])
    row.checks = [f"{check['name']}: {check['detail']}" for check in checks if check["passed"] is False]
    searched: dict[float, list[float | None]] = {}
    for record in records:
        if record["cell"]["stage"] == "search" and record["cell"]["lr"] in about["learning_rates"]:
            loss = record["train_info"]["dev_loss"] if record["status"] == "success" else None
            searched.setdefault(record["cell"]["lr"], []).append(loss)
    row.search = {
        lr: statistics.fmean(losses) if all(_finite(loss) for loss in losses) else None
        for lr, losses in sorted(searched.items())
    }
    if not done:
        return row
    row.lr = done[0]["cell"]["lr"]
    rates = about["learning_rates"]
    row.at_edge = len(rates) > 1 and row.lr in (rates[0], rates[-1])
    _add_metrics(row, done, metric)
    info = [record["train_info"] for record in done]
    losses = [entry["dev_loss"] for entry in info if _finite(entry["dev_loss"])]
    row.dev_loss = Spread(tuple(losses)) if losses else None
    row.trainable, row.total = info[0]["num_trainable_params"], info[0]["num_total_params"]
    row.file_size, row.peak_memory = info[0]["file_size"], max(entry["peak_memory_bytes"] for entry in info)
    row.seconds = statistics.median(entry["train_time"] for entry in info)
    row.tokens_per_second = statistics.median(entry["tokens_per_second"] for entry in info)
    row.decode_ms = statistics.median(entry["decode_ms_per_token"] for entry in info)
    for record in done:
        curve = [(point["step"], point["dev_loss"]) for point in record["train_info"]["metrics"] if "dev_loss" in point]
        known_start = about["kind"] != "prompt" and _finite(start)
        row.curves[record["cell"]["seed"]] = ([(0, start)] if known_start else []) + curve
    return row


def _add_metrics(row: MethodRow, records: Sequence[Mapping], metric: str) -> None:
    for name in records[0]["metrics"]["test"]:
        values = tuple(record["metrics"]["test"][name] for record in records)
        # JSON has no infinity: a perplexity too large for a float is stored as null
        spread = Spread(tuple(math.inf if value is None else value for value in values))
        if name == metric:
            row.scores = spread
        else:
            row.others[name] = spread


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

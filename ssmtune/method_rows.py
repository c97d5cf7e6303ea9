"""One row of a comparison's table: a method on one task, with statistics over its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ssmtune.bootstrap import Difference
from ssmtune.spread import Spread


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
        forgetting: rise of the loss on held-out text from the base, in nats per token.
        length: "1x", "2x", "4x" -> perplexity of the same held-out tokens at the end of texts so many times as long as
            those in training.
        ood: "auroc_softmax", "fpr95_softmax", "auroc_energy", "fpr95_energy" -> percent.
        switch_ms: median time to change to another adapter.
        decode_ratio: decoding time per token, relative to the base.
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
    decode_ratio: float | None = None
    step_ms: float | None = None
    switch_ms: float | None = None
    forgetting: Spread | None = None
    length: dict[str, Spread] = field(default_factory=dict)
    ood: dict[str, Spread] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def base_row(record: Mapping, metric: str) -> MethodRow:
    """The row of the model as it is, from its one record."""
    row = MethodRow("base", "Base model, not tuned", "base", trainable=0)
    if record["status"] != "success":
        row.errors.append(record["error"])
        return row
    _add_metrics(row, [record], metric)
    _add_effects(row, [record])
    info = record["train_info"]
    row.dev_loss = Spread((info["dev_loss"],)) if finite(info["dev_loss"]) else None
    row.total, row.decode_ms = info["num_total_params"], info["decode_ms_per_token"]
    return row


def method_row(method: str, about: Mapping, records: Sequence[Mapping], metric: str, start: float | None) -> MethodRow:
    """The row of a method.

    Args:
        about: what comparison.json says of the method.
        records: all its runs on the task.
        metric: the headline metric.
        start: dev loss of the base.
    """
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
        lr: statistics.fmean(losses) if all(finite(loss) for loss in losses) else None
        for lr, losses in sorted(searched.items())
    }
    if not done:
        return row
    row.lr = done[0]["cell"]["lr"]
    rates = about["learning_rates"]
    row.at_edge = len(rates) > 1 and row.lr in (rates[0], rates[-1])
    _add_metrics(row, done, metric)
    _add_effects(row, done)
    info = [record["train_info"] for record in done]
    losses = [entry["dev_loss"] for entry in info if finite(entry["dev_loss"])]
    row.dev_loss = Spread(tuple(losses)) if losses else None
    row.trainable, row.total = info[0]["num_trainable_params"], info[0]["num_total_params"]
    row.file_size, row.peak_memory = info[0]["file_size"], max(entry["peak_memory_bytes"] for entry in info)
    row.seconds = statistics.median(entry["train_time"] for entry in info)
    row.tokens_per_second = statistics.median(entry["tokens_per_second"] for entry in info)
    row.decode_ms = statistics.median(entry["decode_ms_per_token"] for entry in info)
    row.step_ms = statistics.median(entry["step_ms"] for entry in info)
    for record in done:
        curve = [(point["step"], point["dev_loss"]) for point in record["train_info"]["metrics"] if "dev_loss" in point]
        known_start = about["kind"] != "prompt" and finite(start)
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


def _add_effects(row: MethodRow, records: Sequence[Mapping]) -> None:
    def spread(name: str, read: Callable[[Mapping], float | None]) -> Spread | None:
        """Over the runs that have the effect; JSON has no infinity, which is what null stands for in one."""
        found = [effect for record in records if (effect := record.get("effects", {}).get(name)) is not None]
        values = [math.inf if (value := read(effect)) is None else value for effect in found]
        return Spread(tuple(values)) if values else None

    row.forgetting = spread("forgetting", lambda effect: effect["nats_per_token"])
    if (switch := spread("switching", lambda effect: effect["ms"])) is not None:
        row.switch_ms = statistics.median(switch.values)
    for times in ("1x", "2x", "4x"):
        if (values := spread("length", lambda effect, times=times: effect["perplexity"][times])) is not None:
            row.length[times] = values
    for score in ("softmax", "energy"):
        for measure in ("auroc", "fpr95"):
            values = spread("ood", lambda effect, score=score, measure=measure: effect[score][measure])
            if values is not None:
                row.ood[f"{measure}_{score}"] = values


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

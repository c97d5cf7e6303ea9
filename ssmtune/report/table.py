"""The table of a report: what each column is called, shows, and is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ssmtune.bootstrap import Difference
from ssmtune.summary import MethodRow, Spread, TaskSummary

SHORT_METRICS = {
    "accuracy": "accuracy %",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "bleu": "BLEU",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bits_per_character": "bits/char",
    "execution": "execution %",
    "exact_match": "exact match %",
}
LOWER_IS_BETTER = ("perplexity", "bits_per_character", "loss", "invalid")


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        header: its name, too.
        text: what a cell shows.
        value: what rows are sorted by; the text itself where there is none.
        better: which end of `value` is wanted; None for a column that ranks nothing.
        brief: is in the terminal's table too, whose width is short.
    """

    header: str
    text: Callable[[MethodRow], str]
    value: Callable[[MethodRow], float | None] | None = None
    better: Literal["higher", "lower"] | None = None
    brief: bool = True


def columns(task: TaskSummary) -> list[Column]:
    """The columns of a task's table."""
    reference = reference_title(task)
    others = dict.fromkeys(name for row in task.rows for name in row.others if name != "loss")
    better = "higher" if task.higher_is_better else "lower"
    return [
        Column("method", lambda row: row.title),
        Column(short(task.metric), score_text, lambda row: mean(row.scores), better),
        Column("95 % interval", lambda row: interval_text(row.scores), lambda row: half_width(row.scores), brief=False),
        *([_versus(reference)] if reference else []),
        *([_bootstrap(reference)] if any(row.bootstrap for row in task.rows) else []),
        *(_other_metric(name) for name in others),
        _number("trainable", "{:,}", lambda row: row.trainable, "lower"),
        Column("%", share_text, share, "lower"),
        Column("lr", lr_text, lambda row: row.lr),
        _number("seeds", "{}", seeds, brief=False),
        _number("train s", "{:.1f}", lambda row: row.seconds, "lower", brief=False),
        _number("tok/s", "{:,.0f}", lambda row: row.tokens_per_second, "higher"),
        _number("peak MB", "{:,.0f}", lambda row: _divided(row.peak_memory, 2**20), "lower"),
        _number("saved KB", "{:,.1f}", lambda row: _divided(row.file_size, 1024), "lower"),
        _number("ms/token", "{:.1f}", lambda row: row.decode_ms, "lower"),
        *_effects(task),
    ]


def _versus(reference: str) -> Column:
    return Column(
        f"vs {reference}", lambda row: with_interval(row.difference, signed=True), lambda row: mean(row.difference)
    )


def _bootstrap(reference: str | None) -> Column:
    return Column(
        f"vs {reference}, bootstrap",
        lambda row: "" if row.bootstrap is None else difference_text(row.bootstrap),
        lambda row: None if row.bootstrap is None else row.bootstrap.mean,
        brief=False,
    )


def _effects(task: TaskSummary) -> list[Column]:
    """Columns of what was measured besides the score, where it was."""
    held: list[Column] = [
        _number("× base", "{:.2f}", lambda row: row.decode_ratio, "lower", brief=False),
        _number("step ms", "{:.1f}", lambda row: row.step_ms, "lower", brief=False),
        _number("switch ms", "{:.2f}", lambda row: row.switch_ms, "lower", brief=False),
        _spread("forgetting", lambda row: row.forgetting, "lower"),
        *(_spread(f"ppl {times}", lambda row, t=times: row.length.get(t), "lower") for times in ("1x", "2x", "4x")),
    ]
    for name in ("auroc", "fpr95"):
        for score in ("softmax", "energy"):
            better = "higher" if name == "auroc" else "lower"
            held.append(_spread(f"{name.upper()} {score}", lambda row, key=f"{name}_{score}": row.ood.get(key), better))
    return [column for column in held if any(column.value(row) is not None for row in task.rows)]


def _spread(header: str, spread: Callable[[MethodRow], Spread | None], better) -> Column:
    return Column(header, lambda row: mean_text(spread(row)), lambda row: mean(spread(row)), better, brief=False)


def _other_metric(name: str) -> Column:
    better = "lower" if name.startswith(LOWER_IS_BETTER) else "higher"
    return Column(
        short(name),
        lambda row: mean_text(row.others.get(name)),
        lambda row: mean(row.others.get(name)),
        better,
        brief=False,
    )


def _number(header: str, form: str, value: Callable[[MethodRow], float | None], better=None, brief=True) -> Column:
    return Column(header, lambda row: "" if value(row) is None else form.format(value(row)), value, better, brief)


def merged(tables: Iterable[Sequence[Column]]) -> list[str]:
    """The headers of several tables, each once and in the order of each."""
    headers: list[str] = []
    for table in tables:
        place = 0
        for column in table:
            if column.header in headers:
                place = headers.index(column.header)
            else:
                headers.insert(place, column.header)
            place += 1
    return headers


def reference_title(task: TaskSummary) -> str | None:
    """The method that the others are compared with."""
    return next((row.title for row in task.rows if row.name == task.reference), None)


def best_row(task: TaskSummary) -> MethodRow | None:
    ranked = task.ranked()
    return ranked[0] if ranked else None


def short(metric: str) -> str:
    return SHORT_METRICS.get(metric, metric)


def mean(spread: Spread | None) -> float | None:
    return None if spread is None or not math.isfinite(spread.mean) else spread.mean


def seeds(row: MethodRow) -> int | None:
    return len(row.scores.values) if row.lr and row.scores else None


def half_width(spread: Spread | None) -> float | None:
    return None if spread is None else spread.interval


def score_text(row: MethodRow) -> str:
    """`61.3 ± 1.2`, marked if a check failed; `failed` if nothing was measured."""
    if row.scores is None:
        return "failed" if row.errors else "not run yet"
    text = mean_text(row.scores)
    return text + (" !" if row.checks else "")


def mean_text(spread: Spread | None) -> str:
    """`61.3 ± 1.2`: mean and standard deviation."""
    if spread is None:
        return ""
    digits = _digits(spread.mean)
    text = f"{spread.mean:.{digits}f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:.{digits}f}"


def interval_text(spread: Spread | None) -> str:
    """`[58.1, 64.5]`."""
    if spread is None or spread.interval is None:
        return ""
    digits = _digits(spread.mean)
    return f"[{spread.mean - spread.interval:.{digits}f}, {spread.mean + spread.interval:.{digits}f}]"


def with_interval(spread: Spread | None, signed: bool = False) -> str:
    """`+1.2 ± 3.4`: mean and half-width of its 95 % interval."""
    if spread is None or not math.isfinite(spread.mean):
        return ""
    size = max(abs(spread.mean), spread.interval or 0)
    digits = _digits(size)
    sign = "+" if signed else ""
    return f"{spread.mean:{sign}.{digits}f}" + ("" if spread.interval is None else f" ± {spread.interval:.{digits}f}")


def difference_text(difference: Difference) -> str:
    """`+1.2 [-0.3, 2.8]`: the difference and its 95 % interval."""
    digits = _digits(max(abs(difference.low), abs(difference.high)))
    return f"{difference.mean:+.{digits}f} [{difference.low:.{digits}f}, {difference.high:.{digits}f}]"


def lr_text(row: MethodRow) -> str:
    return "" if row.lr is None else f"{row.lr:.1e}" + ("*" if row.at_edge else "")


def share(row: MethodRow) -> float | None:
    """Trainable parameters in percent of all."""
    return None if not row.total or row.trainable is None else 100 * row.trainable / row.total


def share_text(row: MethodRow) -> str:
    value = share(row)
    if value is None:
        return ""
    return "0" if not value else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _digits(value: float) -> int:
    return 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3


def _divided(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit

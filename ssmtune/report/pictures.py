"""Pictures of a comparison: quality against trainable parameters, learning curves, and differences between methods.

matplotlib is optional; without it there are no pictures.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterable
from importlib.util import find_spec

from ssmtune.report.table import reference_title
from ssmtune.summary import TaskSummary

MISSING = "There are no pictures because matplotlib is not installed. Run: pip install 'ssmtune[plots]'"

METRIC_NAMES = {
    "accuracy": "accuracy, %",
    "perplexity": "perplexity per token",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "bits_per_character": "bits per character",
    "loss": "loss",
    "matthews": "Matthews' correlation, x 100",
    "pearson": "Pearson's correlation, x 100",
    "rouge_1": "ROUGE-1",
    "execution": "execution accuracy, %",
}


TEXT, FAINT, GRID = "#1f2328", "#6e7781", "#e3e6ea"
# The colours of Okabe and Ito, told apart by the colour-blind, then darker ones; the page has the same.
_CORE = ("full", "lora", "prompt-tuning", "initial-state", "state-offset", "state-offset-y")
_PALETTE = (
    "#444444", "#e69f00", "#cc79a7", "#009e73", "#0072b2", "#d55e00",
    "#56b4e9", "#8b5a00", "#882255", "#44aa99", "#6a3d9a", "#7a8500",
)  # fmt: skip
_MARKERS = "sDP^ovX<>phd"


def available() -> bool:
    return find_spec("matplotlib") is not None


def quality_picture(task: TaskSummary) -> bytes | None:
    """PNG of the headline metric against the trainable parameters, with the Pareto front; None without data."""
    rows = [row for row in task.ranked() if row.trainable]
    if not rows:
        return None
    figure, axes = _figure()
    axes.set_xscale("log")
    low, high = min(row.trainable for row in rows), max(row.trainable for row in rows)
    axes.set_xlim(low / 2.2, high * 2.2)
    front = task.pareto()
    if len(front) > 1:
        axes.plot(
            [row.trainable for row in front],
            [row.scores.mean for row in front],
            drawstyle="steps-post",
            color=FAINT,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            zorder=1,
        )
    style, labels = styles(row.name for row in task.rows if row.name != "base"), []
    for row in rows:
        colour, marker = _PALETTE[style[row.name]], _MARKERS[style[row.name]]
        axes.errorbar(
            row.trainable,
            row.scores.mean,
            yerr=row.scores.deviation,
            color=colour,
            marker=marker,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.8,
            capsize=3,
            linewidth=1.4,
            zorder=3,
        )
        values = row.scores.values
        axes.plot([row.trainable] * len(values), values, "_", color=colour, markersize=7, alpha=0.7, zorder=2)
        labels.append((row.trainable, row.scores.mean, row.title, colour))
    base = next((row for row in task.rows if row.name == "base" and row.scores is not None), None)
    if base is not None:
        axes.axhline(base.scores.mean, color=FAINT, linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            "base model, not tuned",
            (1, base.scores.mean),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=FAINT,
            fontsize=8.5,
        )
    axes.margins(y=0.12)
    direction = "higher is better" if task.higher_is_better else "lower is better"
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{METRIC_NAMES.get(task.metric, task.metric)} on test ({direction})")
    _title(axes, f"{task.name}: quality against trainable parameters")
    _place_labels(figure, axes, labels)
    return _png(figure)


def learning_picture(task: TaskSummary) -> bytes | None:
    """PNG of the dev loss along training, the mean over seeds with the range of them; None without data."""
    rows = [row for row in task.rows if any(len(curve) > 1 for curve in row.curves.values())]
    if not rows:
        return None
    figure, axes = _figure(right=0.74)
    style, labels = styles(row.name for row in task.rows if row.name != "base"), []
    for row in rows:
        colour, marker = _PALETTE[style[row.name]], _MARKERS[style[row.name]]
        by_step: dict[int, list[float]] = {}
        for curve in row.curves.values():
            for step, loss in curve:
                by_step.setdefault(step, []).append(loss)
        steps = sorted(step for step, losses in by_step.items() if len(losses) == len(row.curves))
        means = [statistics.fmean(by_step[step]) for step in steps]
        axes.plot(
            steps,
            means,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        axes.fill_between(
            steps,
            [min(by_step[step]) for step in steps],
            [max(by_step[step]) for step in steps],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        labels.append((steps[-1], means[-1], row.title, colour))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("dev loss per target token, nats")
    axes.margins(x=0.02)
    _title(axes, f"{task.name}: learning curves")
    _place_labels(figure, axes, labels, outside=True)
    return _png(figure)


def differences_picture(task: TaskSummary) -> bytes | None:
    """PNG of every method's paired difference to the reference, with its 95 % interval; None without data."""
    rows = [row for row in task.rows if row.difference is not None and math.isfinite(row.difference.mean)][::-1]
    if not rows:
        return None
    figure, axes = _figure(left=0.3, height=1.3 + 0.38 * len(rows))
    axes.axvline(0, color=FAINT, linewidth=1)
    style = styles(row.name for row in task.rows if row.name != "base")
    for height, row in enumerate(rows):
        colour = _PALETTE[style[row.name]]
        axes.errorbar(
            row.difference.mean,
            height,
            xerr=row.difference.interval,
            color=colour,
            marker=_MARKERS[style[row.name]],
            markersize=7,
            capsize=3,
            linewidth=1.4,
        )
        axes.plot(row.difference.values, [height] * len(row.difference.values), "|", color=colour, alpha=0.7)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(False, axis="y")
    better = "right" if task.higher_is_better else "left"
    axes.set_xlabel(f"difference of {METRIC_NAMES.get(task.metric, task.metric)} (better to the {better})")
    _title(axes, f"{task.name}: against {reference_title(task)}, paired by seed")
    return _png(figure)


PICTURES = {"quality": quality_picture, "learning": learning_picture, "differences": differences_picture}


def _figure(left: float = 0.1, right: float = 0.97, height: float = 4.5):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, height), facecolor="white")
    below, above = 0.585 / height, 0.495 / height
    axes = figure.add_axes((left, below, right - left, 1 - below - above), facecolor="white")
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=TEXT, labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    return figure, axes


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=TEXT, pad=10)


def styles(names: Iterable[str]) -> dict[str, int]:
    """A colour and marker for each method, by number: the core methods always have theirs, the others take turns."""
    own = {name: i for i, name in enumerate(_CORE)}
    others = [name for name in dict.fromkeys(names) if name not in own]
    turns = len(_PALETTE) - len(own)
    return own | {name: len(own) + i % turns for i, name in enumerate(others)}


def _place_labels(figure, axes, labels, outside: bool = False) -> None:
    """Write each label beside its point, moved up or down until no two overlap."""
    from matplotlib.patheffects import withStroke
    from matplotlib.textpath import TextPath

    size, line, scale = 9, 13.0, 72 / figure.dpi  # in points
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which the positions depend on
    box = axes.get_window_extent()
    starts, widths, points, lefts = [], [], [], []
    for x, y, text, _ in labels:
        px, py = (value * scale for value in axes.transData.transform((x, y)))
        width = TextPath((0, 0), text, size=size).get_extents().width + 2
        left = not outside and px + width + 14 > box.x1 * scale
        starts.append(px - width - 10 if left else px + 10)
        widths.append(width)
        points.append(py)
        lefts.append(left)
    heights = list(points)
    low, high = box.y0 * scale + line / 2, box.y1 * scale - line / 2
    pairs = [
        (i, j)
        for i in range(len(labels))
        for j in range(i)
        if starts[i] < starts[j] + widths[j] and starts[j] < starts[i] + widths[i]
    ]
    for _ in range(200):
        for i, j in pairs:
            upper, lower = (i, j) if (heights[i], points[i], i) > (heights[j], points[j], j) else (j, i)
            push = (line - (heights[upper] - heights[lower])) / 2
            if push > 0:
                heights[upper] += push
                heights[lower] -= push
        heights = [min(max(height, low), high) for height in heights]
    for (x, y, text, colour), height, py, left in zip(labels, heights, points, lefts, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6} if abs(height - py) > 6 else None
        axes.annotate(
            text,
            (x, y),
            xytext=(-10 if left else 10, height - py),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
            arrowprops=arrow,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=figure.get_facecolor())
    return buffer.getvalue()

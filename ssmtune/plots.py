"""Pictures of a comparison: quality against trainable parameters, and learning curves.

matplotlib is optional; without it there are no pictures. Colours are those of Okabe and Ito, told apart by the
colour-blind, and every method has a marker of its own.
"""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass
from importlib.util import find_spec

from ssmtune.summary import MethodRow, TaskSummary

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


@dataclass(frozen=True)
class Theme:
    """Colours of a picture on a light or a dark page."""

    background: str
    text: str
    faint: str
    grid: str
    full: str
    state_offset: str


LIGHT = Theme("#ffffff", "#1f2328", "#6e7781", "#e3e6ea", "#444444", "#0072b2")
DARK = Theme("#161b22", "#e6edf3", "#8b949e", "#30363d", "#c9d1d9", "#56b4e9")

_MARKERS = {
    "full": "s",
    "lora": "D",
    "prompt-tuning": "P",
    "initial-state": "^",
    "state-offset": "o",
    "state-offset-y": "v",
}
_COLOURS = {"lora": "#e69f00", "prompt-tuning": "#cc79a7", "initial-state": "#009e73", "state-offset-y": "#d55e00"}


def available() -> bool:
    return find_spec("matplotlib") is not None


def quality_picture(task: TaskSummary, theme: Theme = LIGHT) -> bytes | None:
    """PNG of the headline metric against the trainable parameters, with the Pareto front; None without data."""
    rows = [row for row in task.ranked() if row.trainable]
    if not rows:
        return None
    figure, axes = _figure(theme)
    axes.set_xscale("log")
    low, high = min(row.trainable for row in rows), max(row.trainable for row in rows)
    axes.set_xlim(low / 2.2, high * 2.2)
    front = task.pareto()
    if len(front) > 1:
        axes.plot(
            [row.trainable for row in front],
            [row.scores.mean for row in front],
            drawstyle="steps-post",
            color=theme.faint,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            zorder=1,
        )
    labels = []
    for row in rows:
        colour = _colour(row, theme)
        axes.errorbar(
            row.trainable,
            row.scores.mean,
            yerr=row.scores.deviation,
            color=colour,
            marker=_MARKERS.get(row.name, "o"),
            markersize=8,
            markeredgecolor=theme.background,
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
        axes.axhline(base.scores.mean, color=theme.faint, linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            "base model, not tuned",
            (1, base.scores.mean),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=theme.faint,
            fontsize=8.5,
        )
    axes.margins(y=0.12)
    direction = "higher is better" if task.higher_is_better else "lower is better"
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{METRIC_NAMES.get(task.metric, task.metric)} on test ({direction})")
    _title(axes, f"{task.name}: quality against trainable parameters", theme)
    _place_labels(figure, axes, labels, theme)
    return _png(figure)


def learning_picture(task: TaskSummary, theme: Theme = LIGHT) -> bytes | None:
    """PNG of the dev loss along training, the mean over seeds with the range of them; None without data."""
    rows = [row for row in task.rows if any(len(curve) > 1 for curve in row.curves.values())]
    if not rows:
        return None
    figure, axes = _figure(theme, right=0.74)
    labels = []
    for row in rows:
        colour = _colour(row, theme)
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
            marker=_MARKERS.get(row.name, "o"),
            markersize=5,
            linewidth=1.8,
            markeredgecolor=theme.background,
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
    _title(axes, f"{task.name}: learning curves", theme)
    _place_labels(figure, axes, labels, theme, outside=True)
    return _png(figure)


def _figure(theme: Theme, right: float = 0.97):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.5), facecolor=theme.background)
    axes = figure.add_axes((0.1, 0.13, right - 0.1, 0.76), facecolor=theme.background)
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    return figure, axes


def _title(axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=theme.text, pad=10)


def _colour(row: MethodRow, theme: Theme) -> str:
    own = {"full": theme.full, "state-offset": theme.state_offset}
    return own.get(row.name) or _COLOURS.get(row.name, theme.faint)


def _place_labels(figure, axes, labels, theme: Theme, outside: bool = False) -> None:
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
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],
            zorder=5,
        )


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=figure.get_facecolor())
    return buffer.getvalue()

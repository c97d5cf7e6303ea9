"""The comparisons of one report, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmtune.summary import Summary, TaskSummary, summarize


@dataclass(frozen=True)
class Study:
    """A comparison in a report, under a name that no other of the report has."""

    name: str
    summary: Summary


def read_studies(directories: Sequence[Path]) -> list[Study]:
    """Each comparison, named after its model, or after its directory where two have the same model."""
    summaries = [summarize(place) for place in directories]
    names = [Path(summary.config["model"]).name for summary in summaries]
    if len(set(names)) < len(names):
        names = [place.resolve().name for place in directories]
    if len(set(names)) < len(names):
        names = [str(place) for place in directories]
    return [Study(name, summary) for name, summary in zip(names, summaries, strict=True)]


def by_task(studies: Sequence[Study]) -> Iterator[tuple[str, list[tuple[Study, TaskSummary]]]]:
    """Every task with the comparisons that have it."""
    for name in dict.fromkeys(task.name for study in studies for task in study.summary.tasks):
        yield name, [(study, task) for study in studies for task in study.summary.tasks if task.name == name]

"""Tasks: how examples become text, and the metric of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtune.config import ConfigError, nearest

if TYPE_CHECKING:
    from ssmtune.tasks.task import Task

TASKS = {
    "docstring-package": "which standard-library package a docstring documents (accuracy; no data needed)",
    "docstring-continuation": "the second half of a docstring (perplexity; no data needed)",
    "e2e": "a sentence from restaurant attributes (BLEU, ROUGE-L; --data-dir with the E2E NLG csv files)",
    "files": "your own prompts and completions (perplexity; --data-dir with train, dev and test files)",
}


def load_task(
    name: str, data_dir: str | Path | None = None, limit: int | Mapping[str, int] | None = None, seed: int = 0
) -> Task:
    """The task of that name.

    Args:
        name: a key of TASKS.
        data_dir: where the task's files are, for the tasks that have any.
        limit: at most so many examples in each split, or in the splits named; chosen by a hash of their content.
        seed: which examples a limit keeps.

    Raises:
        ConfigError: there is no such task (names the nearest), or `data_dir` is missing or lacks files.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{nearest(name, TASKS)}\n  Tasks: {', '.join(TASKS)}.")
    if name == "e2e":
        from ssmtune.tasks.e2e import e2e_task

        task = e2e_task(data_dir)
    elif name == "files":
        from ssmtune.tasks.files import files_task

        task = files_task(data_dir)
    else:
        from ssmtune.tasks.docstrings import continuation_task, package_task

        task = package_task() if name == "docstring-package" else continuation_task()
    return task.limited(limit, seed)

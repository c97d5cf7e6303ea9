"""Tasks: how examples become text, and the metric of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtune.config import ConfigError, nearest

if TYPE_CHECKING:
    from ssmtune.tasks.task import Task

SPLITS = ("train", "dev", "test")

TASKS = {
    "docstring-package": "which standard-library package a docstring documents (accuracy; no data needed)",
    "docstring-continuation": "the second half of a docstring (perplexity; no data needed)",
    "e2e": "a sentence from restaurant attributes (BLEU, ROUGE-L; E2E NLG)",
    "webnlg": "a text from DBpedia triples (BLEU, seen and unseen categories apart; WebNLG 2017)",
    "dart": "a text from triples of tables (BLEU, ROUGE-L; DART 1.1.1)",
    "samsum": "the summary of a chat (ROUGE-1, -2, -L; SAMSum)",
    "spider": "SQL for a question (execution accuracy, exact set match; Spider)",
    "sst2": "is a review positive (accuracy; GLUE)",
    "cola": "is a sentence good English (Matthews' correlation; GLUE)",
    "mrpc": "do two sentences say the same (accuracy, F1; GLUE)",
    "qqp": "do two questions ask the same (accuracy, F1; GLUE)",
    "stsb": "how alike are two sentences (Pearson's, Spearman's correlation; GLUE)",
    "mnli": "does a hypothesis follow (accuracy, matched and mismatched apart; GLUE)",
    "qnli": "does a sentence answer a question (accuracy; GLUE)",
    "rte": "does a hypothesis follow (accuracy; GLUE)",
    "wnli": "does a sentence with its pronoun resolved follow (accuracy; GLUE)",
    "probe-recall": "digits of letters (exact match; known answer, see docs/tasks.md; no data needed)",
    "probe-copy": "a string of letters given back (exact match; known answer; no data needed)",
    "probe-swaps": "where objects are after swaps (exact match; known answer; no data needed)",
    "probe-style": "capitals where a base wrote either case (exact match; known answer; no data needed)",
    "probe-order": "sorting in an order new to a base (exact match; known answer; no data needed)",
    "files": "your own prompts and completions (perplexity; train, dev and test files)",
}

_MODULES = {
    "docstring-package": "docstrings",
    "docstring-continuation": "docstrings",
    **dict.fromkeys(("probe-recall", "probe-copy", "probe-swaps", "probe-style", "probe-order"), "probes"),
    **dict.fromkeys(("sst2", "cola", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"), "glue"),
}


_REGISTERED: dict[str, Callable[[str, str | Path | None], Task]] = {}


def register_task(name: str, description: str, load: Callable[[str, str | Path | None], Task]) -> None:
    """Make a task known by a name, to `--task` and everything else.

    Args:
        name: the name.
        description: one line, as in TASKS.
        load: gives the task, from the name and the directory of its files, None if there was none given.

    Raises:
        ConfigError: another task has the name.
    """
    if name in TASKS:
        raise ConfigError(f"there is a task {name!r} already: {TASKS[name]}.\n  Take another name.")
    TASKS[name], _REGISTERED[name] = description, load


def load_task(
    name: str, data_dir: str | Path | None = None, limit: int | Mapping[str, int] | None = None, seed: int = 0
) -> Task:
    """The task of that name.

    Args:
        name: a key of TASKS.
        data_dir: where the task's files are, or a dataset on the hub, for the tasks that read any.
        limit: at most so many examples in each split, or in the splits named; chosen by a hash of their content.
        seed: which examples a limit keeps.

    Raises:
        ConfigError: there is no such task (names the nearest), or `data_dir` is missing or lacks files.
        ValueError: the data is broken; names the file and the line.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{nearest(name, TASKS)}\n  Tasks: {', '.join(TASKS)}.")
    if name in _REGISTERED:
        return _REGISTERED[name](name, data_dir).limited(limit, seed)
    # only now: a task's module imports numpy or torch
    module = import_module(f"ssmtune.tasks.{_MODULES.get(name, name)}")
    return module.load(name, data_dir).limited(limit, seed)

"""A task of your own: prompts and completions in files."""

from __future__ import annotations

from pathlib import Path

from ssmtune.data import load_examples
from ssmtune.rows import SUFFIXES
from ssmtune.tasks.continuation import ContinuationTask
from ssmtune.tasks.sources import Release

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
RELEASE = Release(
    "files",
    {split: tuple(name + suffix for name in names for suffix in SUFFIXES) for split, names in SPLIT_NAMES.items()},
    (),
    "Each has the columns prompt and completion; hold out dev and test from what you have.",
)


def load(name: str, data_dir: str | Path | None) -> ContinuationTask:
    """`files`: perplexity of the `completion` column given the `prompt` column.

    `data_dir` holds train, dev (or validation) and test, each a .jsonl, .csv or .tsv file with those two columns.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken file, with its line.
    """
    examples = {split: load_examples(file) for split, file in RELEASE.find(data_dir).items()}
    return ContinuationTask(
        name=name,
        metric="perplexity",
        higher_is_better=False,
        **examples,
        max_length=512,
        description=f"prompts and completions of {data_dir}; perplexity per token of the completion, given the prompt",
    )

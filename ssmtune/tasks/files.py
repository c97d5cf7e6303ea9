"""A task of your own: prompts and completions in files."""

from __future__ import annotations

from pathlib import Path

from ssmtune.config import ConfigError
from ssmtune.data import load_examples
from ssmtune.tasks.continuation import ContinuationTask

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
SUFFIXES = (".jsonl", ".csv", ".tsv")


def load(name: str, data_dir: str | Path | None) -> ContinuationTask:
    """`files`: perplexity of the `completion` column given the `prompt` column.

    `data_dir` holds train, dev (or validation) and test, each a .jsonl, .csv or .tsv file with those two columns.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
    """
    if data_dir is None:
        raise ConfigError(
            "task files reads its data from disk, and no --data-dir was given.\n"
            "  Give a folder with train.jsonl, dev.jsonl and test.jsonl (or .csv), with columns prompt and completion."
        )
    folder, found = Path(data_dir), {}
    for split, names in SPLIT_NAMES.items():
        candidates = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        found[split] = next((file for file in candidates if file.is_file()), None)
    if missing := [f"{split}.jsonl" for split, file in found.items() if file is None]:
        raise ConfigError(
            f"task files: {folder} lacks {', '.join(missing)} (or .csv).\n"
            "  Each file has the columns prompt and completion. Hold out dev and test examples from your training file."
        )
    examples = {split: load_examples(file) for split, file in found.items()}
    return ContinuationTask(
        name=name,
        metric="perplexity",
        higher_is_better=False,
        **examples,
        max_length=512,
        description=f"prompts and completions of {folder}; perplexity per token of the completion, given the prompt",
    )

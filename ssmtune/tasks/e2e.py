"""E2E NLG: write a sentence about a restaurant from its attributes (Novikova et al., SIGDIAL 2017).

Read from the files of the official release. BLEU and ROUGE-L are those of sacrebleu and rouge-score, which tokenise
otherwise than the challenge's own script: numbers compare with each other, not with the leaderboard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ssmtune.data import Example
from ssmtune.rows import csv_rows
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.sources import Release, broken

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
RELEASE = Release(
    "e2e",
    {split: (name,) for split, name in FILES.items()},
    ("e2e", "e2e-dataset"),
    "It is released at https://github.com/tuetschek/e2e-dataset under CC BY-SA 4.0.",
    archive="e2e-dataset.zip",
)


def load(name: str, data_dir: str | Path | None) -> GenerationTask:
    """The E2E task from `data_dir`: a folder with the three csv files or one above it, or e2e-dataset.zip.

    One training example per reference; dev and test have one example per meaning representation, with all its
    references.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken file, with its line.
    """
    pairs = {split: _read_pairs(path) for split, path in RELEASE.find(data_dir).items()}
    return GenerationTask(
        name=name,
        metric="bleu",
        higher_is_better=True,
        train=[_example(meaning, (reference,)) for meaning, reference in pairs["train"]],
        dev=_grouped(pairs["dev"]),
        test=_grouped(pairs["test"]),
        max_new_tokens=80,
        max_length=256,
        description="E2E NLG: restaurant attributes to a sentence, greedy decoding; corpus BLEU (sacrebleu) "
        "against all references",
    )


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for where, row in csv_rows(path):
        # the official files spell the header in two ways
        values = {column.lower(): value for column, value in row.items()}
        if not {"mr", "ref"} <= set(values):
            raise broken(f"{path}: {where} lacks the column mr or ref", f"Its columns: {', '.join(row)}")
        pairs.append((values["mr"].strip(), " ".join(values["ref"].split())))
    return pairs


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[Example]:
    references: dict[str, list[str]] = {}
    for meaning, reference in pairs:
        references.setdefault(meaning, []).append(reference)
    return [_example(meaning, tuple(texts)) for meaning, texts in references.items()]


def _example(meaning: str, references: tuple[str, ...]) -> Example:
    return Example(prompt=prompt(meaning), target=f" {references[0]}", references=references)


def prompt(meaning: str) -> str:
    """`name[The Mill], area[riverside]` as facts and the beginning of the answer."""
    slots = re.findall(r"([^,\[\]][^\[\]]*)\[([^\]]*)\]", meaning)
    facts = "; ".join(f"{slot.strip()} is {value.strip()}" for slot, value in slots)
    return f"Facts: {facts}. In words:"

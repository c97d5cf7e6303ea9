"""E2E NLG: write a sentence about a restaurant from its attributes (Novikova et al., SIGDIAL 2017).

Read from the files of the official release. BLEU and ROUGE-L are those of sacrebleu and rouge-score, which tokenise
otherwise than the challenge's own script: numbers compare with each other, not with the leaderboard.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ssmtune.config import ConfigError
from ssmtune.data import Example
from ssmtune.tasks.generation import GenerationTask

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
WHERE = "It is released at https://github.com/tuetschek/e2e-dataset under CC BY-SA 4.0."


def load(name: str, data_dir: str | Path | None) -> GenerationTask:
    """The E2E task from `data_dir`: a folder with the three csv files (or one below it), or e2e-dataset.zip.

    One training example per reference; dev and test have one example per meaning representation, with all its
    references.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
    """
    if data_dir is None:
        raise ConfigError(
            f"task e2e reads its data from disk, and no --data-dir was given.\n"
            f"  Give the folder of {', '.join(FILES.values())}, or e2e-dataset.zip.\n  {WHERE}"
        )
    pairs = {split: _read_pairs(text, name) for split, (name, text) in _read_files(Path(data_dir)).items()}
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


def _read_files(path: Path) -> dict[str, tuple[str, str]]:
    """Split -> (file name, text)."""
    if not path.exists():
        raise ConfigError(f"task e2e: --data-dir {path} does not exist.\n  {WHERE}")
    found: dict[str, str] = {}
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ConfigError(f"task e2e: {path} is neither a folder nor a zip file.\n  {WHERE}")
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist(), reverse=True):
                found[PurePosixPath(member).name] = archive.read(member).decode("utf-8-sig")
    else:
        archives = sorted(path.glob("e2e-dataset*.zip"))
        if archives and not (path / FILES["train"]).exists():
            return _read_files(archives[0])
        for name in FILES.values():
            candidates = [path / name, *sorted(path.glob(f"*/{name}"))]
            if file := next((file for file in candidates if file.is_file()), None):
                found[name] = file.read_text(encoding="utf-8-sig")
    if missing := [name for name in FILES.values() if name not in found]:
        raise ConfigError(f"task e2e: {path} lacks {', '.join(missing)}.\n  {WHERE}")
    return {split: (name, found[name]) for split, name in FILES.items()}


def _read_pairs(text: str, name: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = {column.lower(): column for column in rows.fieldnames or ()}
    if not {"mr", "ref"} <= set(columns):
        raise ConfigError(f"task e2e: {name} has the columns {list(columns)}, expected mr and ref.\n  {WHERE}")
    return [(row[columns["mr"]].strip(), " ".join(row[columns["ref"]].split())) for row in rows]


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

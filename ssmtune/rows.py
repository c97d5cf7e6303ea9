"""Rows of columns, from files of JSON lines, CSV or TSV, or from the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssmtune.config import ConfigError, nearest
from ssmtune.reasons import first_line

SUFFIXES = (".jsonl", ".csv", ".tsv")


def rows_of(path: str | Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a file, or of a dataset on the hub, each with where it is, such as "line 3".

    Raises:
        ConfigError: there is none of that name, or not one of the kinds that are read.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{path} is a directory.\n  Give one of its files, ending in {', '.join(SUFFIXES)}.")
    if file.is_file():
        if file.suffix not in SUFFIXES:
            raise ConfigError(
                f"{path}: cannot read {file.suffix or 'a file without an ending'}.\n"
                f"  Convert it to one of {', '.join(SUFFIXES)}."
            )
        return json_rows(file) if file.suffix == ".jsonl" else csv_rows(file)
    if file.suffix in (*SUFFIXES, ".json", ".txt") or str(path).count("/") > 1 or str(path).startswith((".", "~")):
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(file.name, siblings)}\n  Check --data.path.")
    return hub_rows(str(path), split)


def json_rows(
    file: Path, example: str = '{"prompt": "…", "completion": "…"}'
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a JSONL file, each with where it is, such as "line 3"; errors show how one looks.

    Raises:
        ValueError: a line is not an object in JSON; names it.
    """
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}: line {number} is not valid JSON ({error.msg} at column {error.colno}).\n"
                f"  Every line must be one object, such as {example}."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}: line {number} holds a {type(row).__name__}, expected an object with columns.\n"
                f"  Every line must be one object, such as {example}."
            )
        yield f"line {number}", row


def csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a CSV or TSV file with its header and quotes, each with where it is, such as "line 3".

    Raises:
        ValueError: a row has not as many fields as the header, or quotes that do not close; names the line.
    """
    reader = csv.DictReader(_lines(file), delimiter="\t" if file.name.endswith(".tsv") else ",", strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{file}: line {reader.reader.line_num} cannot be read: {error}.\n  Check the quotes of that line."
            ) from None
        if row is None:
            return
        if None in row or None in row.values():
            raise ValueError(
                f"{file}: line {reader.reader.line_num} has not {len(reader.fieldnames)} fields as its header.\n"
                "  Put fields that contain the separator in quotes."
            )
        yield f"line {reader.reader.line_num}", row


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline=None if file.name.endswith(".jsonl") else "") as lines:
            yield from lines
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8.\n  Convert it, for example with iconv -t utf-8.") from None


def hub_rows(name: str, split: str, subset: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a dataset on the hub, each with where it is, such as "row 3".

    Args:
        name: `owner/name`, or `owner/name@revision`.
        subset: the part of the dataset that has a name of its own (a "config"), if it has any.

    Raises:
        ConfigError: it cannot be loaded, or only by a version of `datasets` that runs code from the hub.
    """
    from ssmtune.hub import cache_alone_if_unreachable

    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{name!r} is not a local file, and reading datasets from the hub needs the `datasets` package.\n"
            "  Check the path, or run: pip install datasets"
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ConfigError(
            f"{name!r} is not a local file, and datasets {datasets.__version__} may run code from the hub to load it.\n"
            "  From version 4 on it never does.\n  Run: pip install -U datasets"
        )
    path, _, revision = name.partition("@")
    try:
        with cache_alone_if_unreachable():
            rows = datasets.load_dataset(path, subset, split=split, revision=revision or None)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise ConfigError(
            f"{name!r} is not a local file, and split {split!r} of a dataset of that name could not be loaded.\n"
            f"  {first_line(error)}\n  Check the name, the split and the network."
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row

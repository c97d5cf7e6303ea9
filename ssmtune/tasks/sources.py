"""Where the data of a task comes from: the files of its release in a folder, or a dataset on the hub."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmtune.config import ConfigError

EMPTY = "There is nothing to learn from or to measure on"
ENCODING = "All tasks are released in UTF-8"


@dataclass(frozen=True)
class Release:
    """How the data of a task is published.

    Args:
        task: the task's name.
        files: what is looked for -> the names that it may have, all of them relative to one folder.
        folders: where that folder may be below --data-dir, besides --data-dir itself.
        where: where the files are released, and under which licence.
        hub: the name of the same data on the hub, if it is there.
        archive: the zip file of the release, if the files can be read from within.
    """

    task: str
    files: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...]
    where: str
    hub: str = ""
    archive: str = ""

    def find(self, data_dir: str | Path | None) -> dict[str, Path] | None:
        """The path of each of `files`; None where `data_dir` is the name of a dataset on the hub.

        Raises:
            ConfigError: there is no `data_dir`, or it lacks files; names them.
        """
        wanted = ", ".join(names[0] for names in self.files.values()) + f", or {self.archive}" * bool(self.archive)
        if data_dir is None:
            raise ConfigError(
                f"task {self.task} reads its data from disk, and no --data-dir was given.\n"
                f"  Give the folder of {wanted}{f', or {self.hub} to load it from the hub' * bool(self.hub)}.\n"
                f"  {self.where}"
            )
        root = Path(data_dir)
        if not root.exists() and self.hub and re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", str(data_dir)):
            return None
        zipped = root / self.archive if root.is_dir() else root
        if self.archive and zipfile.is_zipfile(zipped):
            root = zipfile.Path(zipped)
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "does not exist"
            raise ConfigError(
                f"task {self.task}: --data-dir {root} {problem}.\n  It should hold {wanted}.\n  {self.where}"
            )
        candidates = [self._found_in(root / folder) for folder in ("", *self.folders)]
        best = max(candidates, key=len)
        if missing := [names for key, names in self.files.items() if key not in best]:
            raise ConfigError(
                f"task {self.task}: {root} lacks {', '.join(' or '.join(names) for names in missing)}.\n"
                f"  Looked there{' and in its folders ' * bool(self.folders)}{', '.join(self.folders)}.\n  {self.where}"
            )
        return best

    def _found_in(self, folder: Path) -> dict[str, Path]:
        found = {}
        for key, names in self.files.items():
            if path := next((folder / name for name in names if (folder / name).exists()), None):
                found[key] = path
        return found


def broken(problem: str, remedy: str) -> ValueError:
    """The error for data that is there and cannot be used: what, where, and what to do about it."""
    return ValueError(f"{problem}.\n  {remedy}.\n  Get the file again, or correct that line.")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise broken(f"{path} is not text in UTF-8 (byte {error.start})", ENCODING) from None


def read_tsv(
    path: Path, columns: Sequence[str], header: Sequence[str] | None = None, skip_broken: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a file with a tab between fields, and no quoting: a quote is a character like others.

    Args:
        columns: those that must be there.
        header: the names of the columns, for a file that does not begin with them.
        skip_broken: pass over rows with too few or too many fields instead of failing.

    Yields:
        ("PATH: line N", column -> text)

    Raises:
        ValueError: a column is missing, a row has too few or too many fields, or there is none; names the line.
    """
    rows = 0
    for number, line in _lines(path):
        fields = line.split("\t")
        if header is None:
            header = fields
            if missing := [column for column in columns if column not in header]:
                raise broken(f"{path}: line 1 has no column {missing[0]!r}", f"Its columns: {', '.join(header)}")
        elif len(fields) == len(header):
            rows += 1
            yield f"{path}: line {number}", dict(zip(header, fields, strict=True))
        elif not skip_broken:
            raise broken(
                f"{path}: line {number} has {len(fields)} fields, expected {len(header)}",
                f"The columns are {', '.join(header)}, with a tab between and no quotes",
            )
    if not rows:
        raise broken(f"{path} has no rows", EMPTY)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty; large files are never in memory as a whole."""
    with path.open("rb") as file:
        # only a line feed ends a line: other separators are part of a text
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise broken(f"{path}: line {number} is not text in UTF-8", ENCODING) from None
            if text:
                yield number, text


def read_json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON file that holds a list of them.

    Yields:
        ("entry N", object), counted from 1

    Raises:
        ValueError: the file is not JSON, naming the line, or not a list of objects, or an empty one.
    """
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise broken(
            f"{path}: line {error.lineno} is not valid JSON ({error.msg} at column {error.colno})",
            "The file may have been cut short while it was copied",
        ) from None
    if not isinstance(entries, list):
        raise broken(
            f"{path} is of type {type(entries).__name__}, expected a list of objects", "It may be another file"
        )
    if not entries:
        raise broken(f"{path} has no entries", EMPTY)
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise broken(
                f"{path}: entry {number} is of type {type(entry).__name__}, expected an object", "See the others"
            )
        yield f"entry {number}", entry

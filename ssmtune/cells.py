"""The cells of a comparison: one training run each, stored as one JSON file each, in a folder for each stage.

A file is there with all its content or not at all, and says by a hash what it is the result of: a sweep can be stopped
anywhere, and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ssmtune.run_directory import write_json

FORMAT = 2


@dataclass(frozen=True)
class Cell:
    """One entry of the sweep.

    Args:
        task, method: what is learnt and how; the method of the model as it is is "base".
        stage: "base" is measured only, "search" looks for a learning rate, "final" is what the report is about.
        lr: peak learning rate; None for the base, and where the search found none.
        seed: of initialisation and data order.
        steps: optimizer steps.
    """

    task: str
    method: str
    stage: Literal["base", "search", "final"]
    lr: float | None = None
    seed: int = 0
    steps: int = 0

    @property
    def name(self) -> str:
        if self.stage == "base":
            return f"{self.task}--base"
        rate = "" if self.lr is None or self.stage == "final" else f"-lr{self.lr:.3g}"
        return f"{self.task}--{self.method}--{self.stage}{rate}-seed{self.seed}"

    def hash(self, conditions: Mapping[str, Any]) -> str:
        """Identifies the result: the cell with everything else that decides it."""
        content = json.dumps({"format": FORMAT, "cell": asdict(self), "conditions": conditions}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class CellStore:
    """The folder of the cells' files."""

    def __init__(self, path: Path):
        self.path = path

    def file(self, cell: Cell) -> Path:
        return self.path / cell.stage / f"{cell.name}.json"

    def finished(self, cell: Cell, hash: str) -> dict[str, Any] | None:
        """The stored result of a cell, if it succeeded under the same conditions."""
        record = read_record(self.file(cell))
        if record is None or record["hash"] != hash or record["status"] != "success":
            return None
        return record

    def write(self, cell: Cell, record: Mapping[str, Any]) -> None:
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": FORMAT, "cell": asdict(cell)} | dict(record))

    def records(self) -> Iterator[dict[str, Any]]:
        """All stored results, in the order of their names."""
        for file in sorted(self.path.glob("*/*.json"), key=lambda file: file.name):
            if (record := read_record(file)) is not None:
                yield record


def read_record(file: Path) -> dict[str, Any] | None:
    """The content of a cell's file; None if there is none, or if it is not one of ours."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and record.get("format") == FORMAT and {"cell", "hash", "status"} <= record.keys()
    return record if ours else None

"""The weights that a comparison keeps: for each method those of the seed with the lowest dev loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmtune.cells import Cell
from ssmtune.run_directory import put_in_place, write_json

# Beside the folders they may become, so that a rename is enough.
INCOMING = ".incoming"


def incoming(out: Path, cell: Cell) -> Path:
    """Where a run leaves its weights."""
    return out / "adapters" / INCOMING / cell.name


def forget_incoming(out: Path) -> None:
    """Remove what runs left that were stopped."""
    shutil.rmtree(out / "adapters" / INCOMING, ignore_errors=True)


def keep_if_best(out: Path, cell: Cell, dev_loss: float | None) -> None:
    """Move the weights that a run has left to adapters/TASK/METHOD, unless those of a better seed are there."""
    found, folder = incoming(out, cell), out / "adapters" / cell.task / cell.method
    mark = {"lr": cell.lr, "seed": cell.seed, "steps": cell.steps, "dev_loss": dev_loss}
    if _is_better(mark, folder / "cell.json"):
        write_json(found / "cell.json", mark)
        folder.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(found, folder)
    else:
        shutil.rmtree(found)


def _is_better(mark: Mapping[str, Any], file: Path) -> bool:
    """Whether the run of `mark` should replace the one that `file` describes, if any."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    if any(kept.get(key) != mark[key] for key in ("lr", "steps")) or kept.get("seed") == mark["seed"]:
        return True
    # the same whatever the order in which runs finish
    return _order(mark) < _order(kept)


def _order(mark: Mapping[str, Any]) -> tuple[float, int]:
    loss = mark.get("dev_loss")
    return (float("inf") if loss is None else loss, mark.get("seed", 0))

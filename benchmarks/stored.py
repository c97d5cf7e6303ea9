"""Where the rows of the benchmarks are kept: one CSV file for each device, or a table of columns of its own."""

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssmtune.measure import results

FOLDER = Path(__file__).with_name("results")


def default_file(device: str) -> Path:
    """benchmarks/results/<device>.csv."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def command_line(name: str, doc: str, quick: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, with the options that say what `store` does.

    Args:
        name: of its module.
        doc: what it measures, in the first line.
        quick: what is measured with `--quick`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    return parser


def store(environment: results.Environment, rows: list[results.Row], quick: bool, path: Path | None) -> None:
    """Append the rows of a run to a file and say so; a quick run is stored only in a file that was named.

    Args:
        path: None for the file of the device.

    Raises:
        ValueError: the file has other columns.
    """
    if path is None and quick:
        return
    path = path or default_file(environment.device)
    results.append(path, rows)
    print(f"{len(rows)} rows appended to {path}\n  next: python -m benchmarks.tables")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the columns of the first, in the place of what was there."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

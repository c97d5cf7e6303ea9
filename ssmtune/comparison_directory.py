"""The directory of a comparison: what must agree between calls that share one.

comparison.json   the conditions, the tasks and the methods      report.md, report.html, results.csv
cells/STAGE       one JSON file per run                          pictures/
adapters/TASK/METHOD   the best weights of each method
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmtune.cells import FORMAT
from ssmtune.config import ConfigError
from ssmtune.run_directory import write_json

FILE = "comparison.json"
OWN = (FILE, "report.md", "report.html", "results.csv", "cells", "adapters", "pictures")
# Everything else in the configuration must be the same for all runs of a comparison.
MAY_GROW = ("tasks", "methods", "seeds")
# Each task has its own, and is held to them.
STEPS = ("steps", "search_steps", "task_steps")
MAY_DIFFER = ("data_dir", "model", *STEPS)


@contextmanager
def at_work_in(out: Path) -> Iterator[None]:
    """Keep other processes from running a comparison in `out`; the system ends that with this process, however it ends.

    Raises:
        ConfigError: another process is at work there, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file.\n  Give a directory with --out.")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"another process is running the comparison in {out}.\n  Wait for it, or give another --out."
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def claim(out: Path, description: Mapping[str, Any], overwrite: bool = False) -> None:
    """Make an existing directory that of this comparison, or check that it is.

    Raises:
        ConfigError: it holds something else; says what differs.
    """
    if overwrite:
        for name in OWN:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    if (out / FILE).is_file():
        there = read_description(out)
        if differing := _differences(there, description):
            raise ConfigError(
                f"{out} holds a comparison under other conditions:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\n  Give another --out, or --overwrite to start afresh. Only tasks, methods and seeds may be added."
            )
        description = _joined(there, description)
    elif any(path.name != f".{FILE}.partial" for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty, and what it holds is not a comparison.\n  Give another --out.")
    write_json(out / FILE, description)


def read_description(out: Path) -> dict[str, Any]:
    """The content of comparison.json.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = out / FILE
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] == FORMAT:
            for task in description["tasks"].values():  # before tasks had steps of their own
                for key in ("steps", "search_steps"):
                    task.setdefault(key, description["config"][key])
            return description
        problem = f"has format {description['format']}, this version reads {FORMAT}"
    except FileNotFoundError:
        problem = "does not exist"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error})"
    raise ConfigError(
        f"{out} is not the directory of a comparison: {file} {problem}.\n"
        "  Give the --out of an earlier `ssmtune compare`, or run one."
    )


def _differences(there: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    lines = []
    if there["model_fingerprint"] != mine["model_fingerprint"]:
        lines.append(
            f"weights of the model: {there['config']['model']} ({there['model_fingerprint']}) there, "
            f"{mine['config']['model']} ({mine['model_fingerprint']}) now"
        )
    for key, value in mine["config"].items():
        if key not in MAY_GROW + MAY_DIFFER and there["config"].get(key) != value:
            lines.append(f"{key}: {there['config'].get(key)} there, {value} now")
    for name, task in mine["tasks"].items():
        known = there["tasks"].get(name)
        if known is None:
            continue
        if known["fingerprint"] != task["fingerprint"]:
            lines.append(f"examples of {name}: other texts (sizes {known['sizes']} there, {task['sizes']} now)")
        for key in ("steps", "search_steps"):
            if known[key] != task[key]:
                lines.append(f"{key} of {name}: {known[key]} there, {task[key]} now")
    for name, method in mine["methods"].items():
        known = there["methods"].get(name)
        if known is not None and known["learning_rates"] != method["learning_rates"]:
            lines.append(f"learning rates of {name}: {known['learning_rates']} there, {method['learning_rates']} now")
    return lines


def _joined(there: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """The description of everything that the directory will hold."""
    joined = dict(mine)
    config = dict(mine["config"])
    for key in ("tasks", "methods"):
        joined[key] = there[key] | mine[key]
        config[key] = list(joined[key])
    config["seeds"] = max(there["config"]["seeds"], mine["config"]["seeds"])
    joined["config"] = config
    return joined

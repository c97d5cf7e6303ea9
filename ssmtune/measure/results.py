"""Measurements as tidy CSV: one row for each number."""

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from ssmtune.measure.timing import Summary

PACKAGES = ("triton", "mamba_ssm", "causal_conv1d")
"""What a result on a GPU depends on besides torch."""


@dataclass(frozen=True)
class Row:
    """One measured number."""

    op: str
    pass_: str  # fwd, bwd, fwdbwd
    backend: str
    dtype: str
    batch: int
    dim: int
    seqlen: int
    dstate: int
    threads: int  # of PyTorch; 0 on a GPU
    variant: str
    metric: str  # cpu time, wall time, gpu time, peak memory, error of <result>
    unit: str
    median: float
    p20: float
    p80: float
    device: str
    torch: str  # its version; on a GPU those of the driver and of other kernels too
    ssmtune: str
    commit: str
    timestamp: str


_DIGITS = ".6g"
COLUMNS = tuple(field.name.rstrip("_") for field in fields(Row))


@dataclass(frozen=True)
class Environment:
    """Where and when a run took place: the last columns of each of its rows."""

    device: str
    torch: str
    ssmtune: str
    commit: str
    timestamp: str

    def row(self, summary: Summary | float, **columns: str | int) -> Row:
        """A row of this run, with numbers as a file keeps them: what is shown now is what is read again."""
        if not isinstance(summary, Summary):
            summary = Summary(summary, summary, summary)
        numbers = {name: float(f"{value:{_DIGITS}}") for name, value in asdict(summary).items()}
        return Row(**columns, **numbers, **asdict(self))

    def __str__(self) -> str:
        return " · ".join(
            (self.device, f"torch {self.torch}", f"ssmtune {self.ssmtune} ({self.commit})", self.timestamp)
        )


def device_name(device: str = "cpu") -> str:
    """The GPU's name, or the processor's with what tells two of one name apart."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(), flags=re.MULTILINE))
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} {found.get('cpu family', '')}-{found.get('model', '')}"


def _software(device: str) -> str:
    """Of torch the version; on a GPU those of its driver and of other kernels too."""
    if device != "cuda":
        return torch.__version__
    found = [torch.__version__, f"driver {_driver()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", version.read_text()) if version.exists() else None
    if found:
        return found[1]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _commit() -> str:
    """Of the checkout this runs from, or what SSMTUNE_COMMIT says where there is no history, as in a copy."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():
            return os.environ.get("SSMTUNE_COMMIT", "unknown")
        sources = ("ssmtune", "csrc", "triton_kernels", "benchmarks", ":!benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str = "cpu") -> Environment:
    """The environment of a run on a device that starts now."""
    import ssmtune

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Environment(device_name(device), _software(device), ssmtune.__version__, _commit(), now)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file, with a header where it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            values = asdict(row).values()
            writer.writerow(f"{value:{_DIGITS}}" if isinstance(value, float) else value for value in values)


def read(path: Path) -> list[Row]:
    """All rows of a CSV file.

    Raises:
        ValueError: the file has other columns.
    """
    _check_header(path)
    types = {field.name.rstrip("_"): field.type for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{"pass_" if name == "pass" else name: types[name](text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]


def time_metric(threads: int) -> str:
    """What tells the time best: the GPU's own; on one thread that of the process, which noise hardly touches."""
    return {0: "gpu time", 1: "cpu time"}.get(threads, "wall time")


def latest(rows: Iterable[Row], op: str) -> list[Row]:
    """The rows of an operator's last run: ratios are taken within one run only."""
    chosen = [row for row in rows if row.op == op]
    last = max((row.timestamp for row in chosen), default=None)
    return [row for row in chosen if row.timestamp == last]


def _check_header(path: Path) -> None:
    with path.open(newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise ValueError(
            f"{path} has the columns {', '.join(header)};\n  expected are {', '.join(COLUMNS)}.\n"
            "  Name another file with --csv."
        )

"""The run directory: where each file lies, and how it gets there whole.

    config.yaml      resolved, reusable with --config       metrics.jsonl   one line per log step
    summary.json     result and environment                 loss.png        drawn at the end
    adapter/         peft format, or model/ for full        samples.md      texts over time
    checkpoints/     weights, optimizer, step, random state of the last checkpoint

Everything is written under a name that begins with a dot and then renamed, so that a full disk or a kill leaves
nothing half-written under a final name.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssmtune.config import ConfigError

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "loss.png", "samples.md")
FOLDERS = ("adapter", "model", "checkpoints")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.md"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Check that a run may be written here.

        Raises:
            ConfigError: it has content and neither resume nor overwrite was asked for.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a run directory.\n  Give another --out.")
        if self.path.is_dir() and any(self.path.iterdir()) and not resume and not overwrite:
            state = "a finished run" if self.summary.is_file() else "files"
            raise ConfigError(
                f"{self.path} already holds {state}.\n"
                "  Use --resume to go on with it, --overwrite to start again, or another --out."
            )

    def prepare(self, *, resume: bool = False) -> None:
        """Make the directory, and clear it of an earlier run unless that is to be resumed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.clear()

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.clear_partial()

    def clear_partial(self) -> None:
        """Remove what an interrupted write left behind."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.partial") if folder.is_dir() else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        return found[-1] if found else None

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after a step."""
        return self.checkpoints / f"step-{step:08d}"

    def drop_checkpoints_before(self, last: Path) -> None:
        """Remove all checkpoints but the last."""
        for path in self.checkpoints.glob("step-*"):
            if path != last:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name only if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    put_in_place(partial, path)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename a folder to `path` on the same file system, in the place of what is there."""
    old = path.with_name(f".{path.name}.old.partial")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(folder, path)
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is either complete or not there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON; NaN is not JSON and becomes null."""
    write_whole(path, json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    import torch

    packages = {}
    for name in ("ssmtune", "torch", "transformers", "peft", "datasets", "bitsandbytes"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (_processor() or platform.machine())
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "revision": _revision(),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    """What was started, as one would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None:
        return [Path(sys.argv[0]).name]
    name = module.name.removesuffix(".__main__")
    return [name] if name == "ssmtune" else ["python", "-m", name]


def _processor() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return None


def _revision() -> str | None:
    """The git revision of a checkout this runs from."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    if isinstance(values, float) and (values != values or values in (float("inf"), float("-inf"))):
        return None
    return str(values) if isinstance(values, Path) else values

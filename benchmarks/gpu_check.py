"""Everything that needs a GPU in one call: the tests marked gpu, then the kernels, decoding and training steps.

`make gpu-check` runs it. Each part is a process of its own with a time of its own, whose output and rows are in files
of `--out` as they come, so that nothing is lost when a part fails or is killed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.stored import default_file
from ssmtune.measure import picture, results

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/gpu-check")
MINUTES = 9.0
GRACE = 20
"""Seconds that a part gets to end by itself once it starts nothing new."""

LAST_LINES = 12


@dataclass(frozen=True)
class Part:
    """A command, and the most seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: float


def parts(device: str, csv: Path) -> list[Part]:
    """What is run, in order; on the CPU only that all of it runs, on the smallest sizes."""
    python = (sys.executable, "-m")
    options = ("--csv", str(csv), "--device", device)
    if device == "cpu":
        return [
            Part("tests", (*python, "pytest", "-q", "tests/benchmarks/test_bounds.py"), 120),
            Part("kernels", (*python, "benchmarks.gpu_kernels", "--quick", *options), 300),
            Part("decoding", (*python, "benchmarks.decoding", "--quick", *options), 300),
            Part("training", (*python, "benchmarks.gpu_training", "--quick", *options), 300),
        ]
    return [
        Part("tests", (*python, "pytest", "-q", "-m", "gpu", "--durations=5"), 150),
        Part("kernels", (*python, "benchmarks.gpu_kernels", *options, "--minutes", "2.8"), 168 + GRACE),
        Part("decoding", (*python, "benchmarks.decoding", *options), 60),
        Part("training", (*python, "benchmarks.gpu_training", *options, "--minutes", "2"), 120 + GRACE),
    ]


def run_part(part: Part, out: Path, environment: Mapping[str, str], seconds: float) -> str:
    """Run a part with its output in a file, and print the end of that.

    Returns:
        "passed", or what happened instead.
    """
    started = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        # a session of its own, so that what it has started ends with it
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1.0, seconds))
            verdict = "passed" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            verdict = f"killed after {seconds:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    print(
        f"== {part.name}: {verdict} in {time.monotonic() - started:.0f} s", *lines[-LAST_LINES:], sep="\n", flush=True
    )
    return verdict


class MambaSsm:
    """mamba_ssm, built for this GPU alone beside the checkout, while the tests run.

    Its setup.py names nine targets, which would take an hour; this one is built in two or three minutes.
    """

    def __init__(self, source: str, out: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="mamba-ssm-"))
        self.site = self.folder / "site"
        self.log = (out / "mamba_ssm.log").open("w")
        sdist = Path(source) if Path(source).is_file() else self._download(source)
        with tarfile.open(sdist) as archive:
            archive.extractall(self.folder, filter="data")
        (tree,) = (path.parent for path in self.folder.glob("*/setup.py"))
        setup = tree / "setup.py"
        setup.write_text(one_target(setup.read_text()))
        major, minor = torch.cuda.get_device_capability()
        variables = {
            "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
            "MAX_JOBS": str(os.cpu_count()),
            "MAMBA_FORCE_BUILD": "TRUE",
            "MAMBA_KEEP_CUDA_BUILD": "TRUE",
        }
        command = [*_PIP, "install", "--no-deps", "--no-build-isolation", "--target", str(self.site), str(tree)]
        self.process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _download(self, requirement: str) -> Path:
        command = [*_PIP, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", requirement]
        subprocess.run(
            [*command, "-d", str(self.folder)],
            env={**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}, stdout=self.log, stderr=self.log, check=True,
        )  # fmt: skip
        return next(self.folder.glob("mamba_ssm-*.tar.gz"))

    def wait(self, seconds: float) -> Path | None:
        """Where it is installed; None where it was not built in that time."""
        try:
            status = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait()
        print(f"== mamba_ssm: {'built' if status == 0 else 'not built, it is left out'}", flush=True)
        return self.site if status == 0 else None


_PIP = (sys.executable, "-m", "pip")


def one_target(setup: str) -> str:
    """The setup.py of mamba_ssm without the targets it names, so that TORCH_CUDA_ARCH_LIST decides."""
    setup = setup.replace('cc_flag.append("-gencode")', "pass")
    return re.sub(r'cc_flag\.append\("arch=compute_[^)]*\)', "pass", setup)


def run(out: Path = OUT, device: str = "cuda", mamba_ssm: str | None = None, minutes: float = MINUTES) -> int:
    """Run all parts.

    Args:
        out: folder of the logs, rows, tables and picture.
        device: cuda, or cpu to see that all of it runs.
        mamba_ssm: an sdist of it or a requirement, to build and measure beside; None to take what is installed.
        minutes: for all parts together.

    Returns:
        0 when every part passed, 1 otherwise.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: no GPU found (torch {torch.__version__}).\n  --device cpu tries the parts.", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * minutes
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    csv = out / default_file(results.device_name(device)).name
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    verdicts = {}
    built = _start(mamba_ssm, out)
    for part in parts(device, csv):
        if built is not None and part.name != "tests":
            # what comes after still needs its time
            site = built.wait(min(60.0, deadline - time.monotonic()))
            if site is not None:
                environment["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            built = None
        left = deadline - time.monotonic()
        verdicts[part.name] = run_part(part, out, environment, min(part.seconds, left)) if left > 0 else "no time left"
    summarise(csv, out)
    print(*(f"{name}: {verdict}" for name, verdict in verdicts.items()), sep="\n")
    return 0 if set(verdicts.values()) == {"passed"} else 1


def _start(mamba_ssm: str | None, out: Path) -> MambaSsm | None:
    if not mamba_ssm:
        return None
    try:
        return MambaSsm(mamba_ssm, out)
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError, tarfile.TarError, StopIteration) as error:
        print(f"== mamba_ssm: not built, it is left out: {error}", flush=True)
        return None


def summarise(csv: Path, out: Path) -> None:
    """Write and print the tables of what was measured, and draw the scan against seqlen."""
    if not csv.exists():
        print("nothing was measured")
        return
    text = tables.section(csv)
    (out / "tables.md").write_text(text)
    print(text)
    try:
        picture.draw(results.read(csv), out / "scan.png")
    except (RuntimeError, ValueError) as error:
        print(f"no picture: {error}")
    print(f"rows in {csv}\n  To keep them: cat them to benchmarks/results, then python -m benchmarks.tables")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"where logs and rows go (default: {OUT})")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--mamba-ssm", help="an sdist or a requirement (mamba-ssm==2.3.2.post1) to build for this GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES:g})")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

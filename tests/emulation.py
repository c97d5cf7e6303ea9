"""CUDA sources compiled for the CPU with the emulator, once for each state of them, into build/emulated."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
CACHE = ROOT / "build" / "emulated"
FLAGS = ("-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=fast")
SANITIZE = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KEPT = 4
"""States of a library that stay: another process may be about to load the one before."""


def compile_library(name: str, sources: list[Path], sanitize: bool = False, options: Sequence[str] = ()) -> Path:
    """Compile CUDA sources and the emulator into a library, side by side, and link them; skips without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = [*FLAGS, *(SANITIZE if sanitize else ("-O2",)), f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", *options]
    read = sorted({*EMULATOR.iterdir(), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir(), *sources})
    state = hashlib.sha256(repr((compiler, flags, sources)).encode())
    for path in read:
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            state.update(path.read_bytes())
    library = CACHE / f"{name}-{state.hexdigest()[:16]}.so"
    if library.is_file():
        return library

    CACHE.mkdir(parents=True, exist_ok=True)
    # a lock, for another process may be compiling the same; a folder of its own, which goes if this one is interrupted
    with (CACHE / f"{name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return library
        objects = {Path(folder, f"{i}.o"): path for i, path in enumerate([EMULATOR / "emulator.cpp", *sources])}

        def compile_source(target: Path) -> subprocess.CompletedProcess:
            command = [compiler, *flags, "-x", "c++", "-c", objects[target], "-o", target]
            return subprocess.run(command, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in pool.map(compile_source, objects):
                assert done.returncode == 0, done.stderr
        unfinished = Path(folder, library.name)
        subprocess.run([compiler, *flags, "-shared", *objects, "-o", unfinished], check=True)
        unfinished.replace(library)
    kept = sorted(CACHE.glob(f"{name}-{'?' * 16}.so"), key=lambda path: path.stat().st_mtime)
    for old in kept[:-KEPT]:
        old.unlink(missing_ok=True)
    return library

"""CUDA sources compiled for the CPU with the emulator, once for each state of them, into build/emulated."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from ssmtune.ops import backends

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("emulator")
CACHE = ROOT / "build" / "emulated"
FLAGS = ("-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=fast")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def load_module(name: str, path: str) -> ModuleType:
    """Load a file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated_scan = load_module("emulated_scan", "cuda/emulated_scan.py")
scan_inputs = load_module("ops_fixtures", "ops/conftest.py").scan_inputs
for name in ("test_selective_scan", "test_selective_scan_oracles", "test_selective_scan_packed"):
    load_module(f"ops_{name}", f"ops/{name}.py")


def compile_library(name: str, sources: list[Path], sanitize: bool = False, options: Sequence[str] = ()) -> Path:
    """Compile CUDA sources and the emulator into a library, side by side, and link them; skips without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = [*FLAGS, *(("-O1", *SANITIZE) if sanitize else ("-O2",)), f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", *options]
    read = sorted({*EMULATOR.iterdir(), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir(), *sources})
    state = hashlib.sha256(repr((compiler, flags, sources)).encode())
    for path in read:
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            state.update(path.read_bytes())
    library = CACHE / f"{name}-{state.hexdigest()[:16]}.so"
    if library.is_file():
        return library

    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{name}-*"):
        old.unlink()
    objects = {library.with_suffix(f".{i}.o"): path for i, path in enumerate([EMULATOR / "emulator.cpp", *sources])}

    def compile_source(target: Path) -> subprocess.CompletedProcess:
        command = [compiler, *flags, "-x", "c++", "-c", objects[target], "-o", target]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_source, objects):
            assert done.returncode == 0, done.stderr
    unfinished = library.with_suffix(".new")
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", unfinished], check=True)
    for path in objects:
        path.unlink()
    unfinished.replace(library)
    return library


@pytest.fixture(scope="session")
def emulated_library() -> Callable[..., Path]:
    """`emulated_library(name, sources, sanitize=False)`, the path of a library of CUDA sources compiled for the CPU."""
    return compile_library


@pytest.fixture(scope="session")
def sanitized() -> Callable[..., subprocess.CompletedProcess]:
    """`sanitized(arguments)` runs Python with the runtime of AddressSanitizer, which has to be loaded before it."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        compiler = os.environ.get("CXX", "g++")
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        ask = [[compiler, f"-print-file-name={name}"] for name in names]
        runtimes = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
        if not all(Path(runtime).is_absolute() for runtime in runtimes):
            pytest.skip(f"{compiler} has no AddressSanitizer")
        # Python leaks at exit by design, and by itself puts small objects side by side
        settings = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
        environment = {**os.environ, **settings, **variables}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def emulated_scan_library(emulated_library) -> Path:
    """The selective scan compiled for the CPU; where SSMTUNE_SANITIZED is set, some of it under AddressSanitizer."""
    sanitize = bool(os.environ.get("SSMTUNE_SANITIZED"))
    kernels = [ROOT / "csrc" / "cuda" / f"selective_scan_{dtype}.cu" for dtype in ("fp32", "bf16", "fp16")]
    if sanitize:
        kernels = [EMULATOR / "selective_scan_sanitized.cu"]
    sources = [ROOT / "csrc" / "cuda" / "selective_scan.cpp", EMULATOR / "selective_scan.cpp", *kernels]
    return emulated_library("scan-sanitized" if sanitize else "scan", sources, sanitize)


@pytest.fixture
def backend(emulated_scan_library, monkeypatch) -> str:
    """The name of a backend that runs the CUDA kernels on the CPU."""
    emulated_scan.load(emulated_scan_library)
    cpu = backends.BACKENDS["cpu"]
    emulated = backends.Backend(
        "cuda-emulated", "emulated CUDA", "emulated_scan", ("selective_scan",), lambda op: None, cpu.accepts
    )
    monkeypatch.setitem(backends.BACKENDS, emulated.name, emulated)
    return emulated.name

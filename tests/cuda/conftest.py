"""CUDA kernels on the CPU: the libraries that the tests call, and what they share with the tests of the operators."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import emulated_cuda
import pytest
from emulation import ROOT, compile_library

from ssmtune.ops import backends


def load_module(name: str, path: str) -> ModuleType:
    """Load a file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scan_inputs = load_module("ops_fixtures", "ops/conftest.py").scan_inputs
load_module("ops_test_selective_scan", "ops/test_selective_scan.py")


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


@pytest.fixture
def backend(monkeypatch) -> Iterator[str]:
    """The name of the backend that runs the CUDA kernels on the CPU, threads in their order."""
    monkeypatch.setitem(backends.BACKENDS, "cuda-emulated", emulated_cuda.backend())
    emulated_cuda.set_order(0)
    yield "cuda-emulated"
    emulated_cuda.set_order(0)

"""The C++ compiles for ARM: the cross compiler is zig, from the package ziglang."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("*.cpp"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ziglang") is None, reason="ziglang is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_compiles_for_aarch64(source, tmp_path):
    (torch,) = find_spec("torch").submodule_search_locations
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"),
        *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-pass-failed"),
        *(f"-I{ROOT / 'csrc'}", f"-isystem{torch}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-c", str(source), "-o", str(tmp_path / "object.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The compiled kernels read and write no memory but their own, on any number of threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sanitizers_find_nothing():
    script = ROOT / ".ci" / "sanitize"
    if not script.is_file() or not all(shutil.which(tool) for tool in ("g++", "cmake")):
        pytest.skip("needs a checkout, GCC and CMake")
    done = subprocess.run([script], env=os.environ | {"PY": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

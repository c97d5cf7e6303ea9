import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssmtune

ROOT = Path(__file__).resolve().parents[2]


def setup_py(*arguments, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_unknown_mode():
    done = setup_py("--version", SSMTUNE_BUILD="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "SSMTUNE_BUILD=yes: expected auto, require or off"


def test_required_build_without_tools_fails_and_names_one(tmp_path):
    done = setup_py("--version", SSMTUNE_BUILD="require", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "cannot be built: no cmake" in done.stderr or "cannot be built: no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_automatic_build_without_tools_goes_on(tmp_path):
    done = setup_py("--version", SSMTUNE_BUILD="auto", PATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.strip().endswith(ssmtune.__version__)
    assert "installing without them" in done.stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
@pytest.mark.parametrize("mode", ["auto", "require"])
def test_source_that_does_not_compile(mode, tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").write_text("int f( {")
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "ssmtune").mkdir()
    shutil.copy(ROOT / "ssmtune" / "__init__.py", tmp_path / "ssmtune")
    stale = tmp_path / "ssmtune" / "_C.so"
    stale.write_text("of an earlier build")

    done = setup_py("-q", "build_ext", "--inplace", folder=tmp_path, SSMTUNE_BUILD=mode)
    assert done.returncode == (1 if mode == "require" else 0), done.stderr
    assert "the compiled kernels did not build" in done.stderr
    assert not stale.exists()


def test_setup_never_imports_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('setup.py imported torch')")
    done = setup_py("--version", SSMTUNE_BUILD="auto", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr

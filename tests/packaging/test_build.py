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
        env={**os.environ, "SSMTUNE_CUDA": "auto", **environment},
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


def test_unknown_cuda_mode():
    done = setup_py("--version", SSMTUNE_CUDA="maybe")
    assert done.returncode == 1
    assert done.stderr.strip() == "SSMTUNE_CUDA=maybe: expected auto, 1 or 0"


def test_cuda_is_only_built_where_torch_has_it_or_it_is_asked_for(tmp_path):
    code = """
import os, runpy
build = runpy.run_path("setup.py")
print(build["why_not_cuda"]())
"""

    def why_not(**environment):
        settings = {"SSMTUNE_TORCH_DIR": str(tmp_path / "torch"), "CUDACXX": "/somewhere/nvcc", **environment}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    (tmp_path / "torch" / "lib").mkdir(parents=True)
    assert why_not(SSMTUNE_CUDA="auto") == "torch is built without CUDA"
    assert why_not(SSMTUNE_CUDA="1") == "None"
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert why_not(SSMTUNE_CUDA="auto") == "None"
    assert why_not(SSMTUNE_CUDA="0") == "SSMTUNE_CUDA=0"


def test_cuda_that_is_asked_for_and_cannot_be_built_fails(tmp_path):
    done = setup_py("--version", SSMTUNE_CUDA="1", SSMTUNE_BUILD="off")
    assert done.returncode == 1
    expected = "ssmtune: SSMTUNE_CUDA=1, but the CUDA kernels cannot be built: SSMTUNE_BUILD=off"
    assert done.stderr.strip() == expected

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ssmtune

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source: building in the checkout would leave folders in it."""
    copy = tmp_path_factory.mktemp("source") / "ssmtune"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    copy.mkdir()
    for name in ("ssmtune", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".txt", ".md", ".in", ""):
            shutil.copy(path, copy)
    return copy


def setup_py(source, *command):
    environment = {**os.environ, "SSMTUNE_BUILD": "off", "SSMTUNE_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", *command]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """A wheel without compiled kernels."""
    out = tmp_path_factory.mktemp("wheel")
    setup_py(source, "bdist_wheel", "--dist-dir", str(out))
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def files_below(folder, pattern):
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_source_distribution_holds_every_source(source, tmp_path):
    setup_py(source, "sdist", "--dist-dir", str(tmp_path))
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = files_below("csrc", "*")
    assert "csrc/cuda/causal_conv1d_bwd.cu" in sources
    assert sources - names == set()


def test_holds_every_module(names):
    modules = files_below("ssmtune", "*.py")
    assert "ssmtune/cli/main.py" in modules
    assert modules - names == set()


def test_holds_every_data_file(names):
    data = files_below("ssmtune/checkpoints", "*") | files_below("ssmtune/recipes", "*")
    data |= files_below("ssmtune/measure", "*.cpp") | files_below("ssmtune/report/page", "*")
    assert "ssmtune/report/page/charts.js" in data
    assert data - names == set()


def test_triton_kernels_are_a_sub_package_only(names):
    kernels = files_below("triton_kernels", "*.py")
    assert kernels
    assert {f"ssmtune/{name}" for name in kernels} - names == set()
    assert {name.partition("/")[0] for name in names} == {"ssmtune", f"ssmtune-{ssmtune.__version__}.dist-info"}


def test_pure_wheel_is_for_every_platform(wheel, names):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"ssmtune-{ssmtune.__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert (
        "ssmtune = ssmtune.cli.main:main"
        in archive.read(f"ssmtune-{ssmtune.__version__}.dist-info/entry_points.txt").decode()
    )


def test_runs_from_the_wheel(wheel, tmp_path):
    # run from an empty folder, so that nothing comes from the checkout
    code = """
import ssmtune, ssmtune.native, importlib.util
assert ssmtune.__file__.startswith({unpacked!r}), ssmtune.__file__
assert ssmtune.__path__ == [{unpacked!r} + "/ssmtune"], ssmtune.__path__
assert importlib.util.find_spec("ssmtune.triton_kernels.selective_state_update") is not None
assert not ssmtune.native.is_loaded() and "_C.so is missing" in ssmtune.native.why_not()
"""
    unpacked = str(tmp_path / "site")
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": unpacked, "SSMTUNE_LAZY": "1"}
    environment.pop("SSMTUNE_NO_NATIVE", None)
    done = subprocess.run(
        [sys.executable, "-c", code.format(unpacked=unpacked)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmtune import native
from ssmtune.ops import selective_scan, ssd_scan

ROOT = Path(__file__).resolve().parents[2]

libraries = pytest.mark.parametrize(
    "library",
    [
        pytest.param(path, marks=pytest.mark.skipif(not path.is_file(), reason=f"ssmtune/{path.name} is not built"))
        for path in (native.LIBRARY, native.CUDA_LIBRARY)
    ],
    ids=lambda path: path.name,
)
needs_library = pytest.mark.skipif(not native.LIBRARY.is_file(), reason="ssmtune/_C.so is not built")
needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="nm and readelf are not installed"
)


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def run_python(code, **environment):
    environment = {**os.environ, "SSMTUNE_LAZY": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_built_where_the_build_was_required():
    if os.environ.get("SSMTUNE_BUILD") != "require":
        pytest.skip("SSMTUNE_BUILD is not 'require'")
    assert native.is_loaded(), native.why_not()


@libraries
@needs_binutils
def test_library_is_bound_to_no_python_and_no_path(library):
    undefined = output_of("nm", "-D", "--undefined-only", str(library))
    assert not re.findall(r"\b_?Py[A-Z_]\w*", undefined)
    dynamic = output_of("readelf", "-d", str(library))
    assert not re.findall(r"RPATH|RUNPATH", dynamic)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    # the C and C++ runtimes, and one library of torch: in particular no libpython, libc10 or libgomp
    system = {"libstdc++.so.6", "libm.so.6", "libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    assert needed - system == {"libtorch_cpu.so"}


@libraries
@needs_binutils
def test_library_uses_only_the_stable_interface_of_torch(library):
    # anything else of torch is mangled C++, which changes from release to release
    undefined = output_of("nm", "-D", "--undefined-only", str(library)).split()
    torch_symbols = {name for name in undefined if re.search(r"aoti_|torch_|_ZN?K?(2at|3c10|5torch)", name)}
    assert torch_symbols
    assert {name for name in torch_symbols if not name.startswith(("aoti_torch_", "torch_"))} == set()


@needs_binutils
def test_instruction_sets_share_no_code():
    # of an inline function defined in several objects the linker keeps one: it must not be that of AVX-512
    objects = ROOT / "build" / "cmake" / "CMakeFiles"
    folders = {path.name: path for path in [*objects.glob("kernels_*.dir"), *objects.glob("_C.dir")]}
    if "kernels_avx512.dir" not in folders:
        pytest.skip("the kernels were not built in build/cmake for several instruction sets")
    inline = {}
    for name, folder in folders.items():
        symbols = output_of("nm", "--defined-only", *map(str, folder.rglob("*.o"))).splitlines()
        inline[name] = {match[1] for line in symbols if (match := re.search(r" W (\S+)$", line))}
    for name in ("kernels_avx512_bf16.dir", "kernels_avx512.dir", "kernels_avx2.dir"):
        others = set().union(*(symbols for other, symbols in inline.items() if other != name))
        assert inline[name] & others == set()


@needs_library
def test_loads_and_names_its_instruction_set():
    if os.environ.get("SSMTUNE_NO_NATIVE"):
        pytest.skip("SSMTUNE_NO_NATIVE is set")
    assert native.is_loaded()
    assert native.why_not() is None
    assert native.cpu_capability() in ("avx512_bf16", "avx512", "avx2", "default")


@pytest.mark.skipif(not native.CUDA_LIBRARY.is_file(), reason="ssmtune/_C_cuda.so is not built")
def test_cuda_kernels_load_with_any_torch():
    # without a GPU too, and with a torch without CUDA
    code = """
import torch
from ssmtune import native
assert native.is_loaded()
torch.ops.load_library(str(native.CUDA_LIBRARY))
assert native.cuda_architectures().startswith("sm_")
updates = ("selective_state_update", "causal_conv1d_update")
for name in ("selective_scan_fwd", "selective_scan_bwd", "causal_conv1d_fwd", "causal_conv1d_bwd", *updates):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ssmtune_native::{name}", "CUDA"), name
"""
    run_python(code)


def test_cuda_kernels_are_left_alone_by_a_torch_without_cuda(monkeypatch):
    if torch.version.cuda is not None or not native.is_loaded():
        pytest.skip("torch is built with CUDA, or there are no compiled kernels")
    assert native.cuda_why_not().startswith(f"not in use: torch {torch.__version__} is built without CUDA")


def test_cuda_kernels_that_are_not_built_come_with_a_remedy(monkeypatch, tmp_path):
    if not native.is_loaded():
        pytest.skip(native.why_not())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_cuda_loaded", False)
    monkeypatch.setattr(native, "_cuda_reason", None)
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    reason = native.cuda_why_not()
    assert reason.startswith(f"not built: {tmp_path / '_C_cuda.so'} is missing") and "SSMTUNE_CUDA=1" in reason


def test_switched_off():
    code = """
from ssmtune import native
native.load()
assert not native.is_loaded()
assert native.cpu_capability() is None
print(native.why_not())
"""
    assert "SSMTUNE_NO_NATIVE" in run_python(code, SSMTUNE_NO_NATIVE="1")


def test_switched_off_the_reference_runs():
    code = """
import torch
from ssmtune.ops import available_backends, selective_scan
reasons = available_backends("selective_scan")
assert "SSMTUNE_NO_NATIVE" in reasons["cpu"] and reasons["reference"] is None
u, B = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
out = selective_scan(u, u, -torch.ones(2, 4), B, B)
assert out.shape == (1, 2, 3) and out.isfinite().all()
"""
    run_python(code, SSMTUNE_NO_NATIVE="1")


def test_library_that_does_not_load(tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.delenv("SSMTUNE_NO_NATIVE", raising=False)
    assert not native.is_loaded()
    assert str(broken) in native.why_not()
    assert "reinstall" in native.why_not()


@needs_library
def test_a_library_without_an_operator_names_the_command_that_builds_it(monkeypatch):
    if not native.is_loaded():
        pytest.skip(native.why_not())
    monkeypatch.setattr(torch.ops, "ssmtune_native", object())
    u, B = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    with pytest.raises(RuntimeError, match="no operator selective_scan_fwd: .* older sources") as error:
        selective_scan(u, u, -torch.ones(2, 4), B, B, backend="cpu")
    assert f"{native.LIBRARY} has" in str(error.value) and "pip install -v ." in str(error.value)
    x, dt, C = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2), torch.ones(1, 3, 1, 4)
    with pytest.raises(RuntimeError, match="no operator ssd_scan_fwd"):
        ssd_scan(x, dt, -torch.ones(2), C, C, backend="cpu")

"""The backend "cuda-emulated": the CUDA kernels with their binding, run on the CPU by the emulator in tests/cuda."""

import ctypes
import importlib.util
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from emulation import EMULATOR, ROOT, compile_library

from ssmtune import native
from ssmtune.ops import cpu, cuda
from ssmtune.ops.backends import OPERATORS, Backend

NAMESPACE = "ssmtune_emulated"
NATIVE = (
    *("selective_scan_fwd", "selective_scan_bwd", "selective_state_update"),
    *("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"),
)
# kept, for the operators go when it does
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@cache
def backend() -> Backend:
    """Compile the kernels, register them as operators, and return the backend that calls them."""
    if not native.is_loaded():
        pytest.skip(f"compiled kernels: {native.why_not()}")
    compiled = path()
    for name in NATIVE:
        schema = str(torch._C._get_schema(f"ssmtune_native::{name}", ""))
        LIBRARY.define(schema.removeprefix("ssmtune_native::"))
    torch.ops.load_library(str(compiled))

    # the same calls as for the real kernels, into other operators
    spec = spec_from_file_location("emulated_kernels", cpu.__file__)
    module = sys.modules["emulated_kernels"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.kernels = getattr(torch.ops, NAMESPACE)
    module.chunk_states_shape = cuda.chunk_states_shape
    return Backend("cuda-emulated", "emulated CUDA", spec.name, OPERATORS, lambda op: None, _accepts)


def library() -> ctypes.CDLL:
    """What operators.cpp and selective_scan.cpp of tests/cuda/emulator offer."""
    return ctypes.CDLL(str(path()))


@cache
def path() -> Path:
    """Compile the library, or find the one compiled before."""
    folder = ROOT / "csrc" / "cuda"
    left_out = {"runtime.cu", "library.cpp"}
    sources = [source for source in sorted(folder.glob("*.c*")) if source.name not in left_out]
    others = [ROOT / "csrc" / "tensors.cpp", ROOT / "csrc" / "cpu" / "buffer.cpp"]
    others += [EMULATOR / "operators.cpp", EMULATOR / "selective_scan.cpp"]
    (directory,) = importlib.util.find_spec("torch").submodule_search_locations
    options = [f"-isystem{directory}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSSMTUNE_EMULATED"]
    options += ["-Wl,--no-as-needed", f"-L{directory}/lib", "-ltorch_cpu"]
    return compile_library("operators", sources + others, options=options)


def _accepts(call) -> str | None:
    return None if call.asked_by_name and call.device == "cpu" else "emulation is for tests"

"""The backend "cuda-emulated": the CUDA kernels with their binding, run on the CPU by the emulator in tests/cuda.

Where SSMTUNE_SANITIZED is set, it is the scan of bfloat16 with up to 16 states alone, under AddressSanitizer.
"""

import ctypes
import importlib.util
import os
import sys
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

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
    module.native = SimpleNamespace(operator=partial(getattr, getattr(torch.ops, NAMESPACE)))
    module.chunk_states_shape = cuda.chunk_states_shape
    return Backend("cuda-emulated", "emulated CUDA", spec.name, OPERATORS, lambda op: None, _accepts)


def library() -> ctypes.CDLL:
    """What operators.cpp of tests/cuda/emulator offers."""
    return ctypes.CDLL(str(path()))


@cache
def path() -> Path:
    """Compile the library, or find the one compiled before."""
    sanitize = bool(os.environ.get("SSMTUNE_SANITIZED"))
    left_out = {"runtime.cu", "library.cpp"}
    others = [ROOT / "csrc" / "tensors.cpp", ROOT / "csrc" / "cpu" / "buffer.cpp", EMULATOR / "operators.cpp"]
    if sanitize:
        left_out |= {f"selective_scan_{dtype}.cu" for dtype in ("bf16", "fp16", "fp32")}
        left_out |= {"causal_conv1d_binding.cpp", "selective_state_update_binding.cpp"}
        others.append(EMULATOR / "selective_scan_sanitized.cu")
    sources = [source for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")) if source.name not in left_out]
    (directory,) = importlib.util.find_spec("torch").submodule_search_locations
    options = [f"-isystem{directory}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSSMTUNE_EMULATED"]
    options += ["-Wl,--no-as-needed", f"-L{directory}/lib", "-ltorch_cpu"]
    return compile_library("sanitized" if sanitize else "operators", sources + others, sanitize, options)


def set_order(order: int) -> None:
    """Choose the order of threads and blocks: 0 forward, 1 in reverse, others shuffle them."""
    library().set_order(order)


def scan_layout(
    backward: bool, batch: int, dim: int, seqlen: int, dstate: int, groups: int = 1, rows: int | None = None
) -> dict[str, int]:
    """How a scan of these sizes is cut into blocks, and the memory it needs, backward for all gradients."""
    names = ("states", "lanes", "block_channels", "section_blocks", "channel_blocks", "row_groups", "segments")
    numbers = (ctypes.c_int64 * 9)()
    sizes = map(ctypes.c_int64, (batch, dim, seqlen, dstate, groups, rows or batch))
    library().scan_layout(backward, *sizes, numbers)
    return dict(zip((*names, "blocks", "workspace_floats"), numbers, strict=True))


def _accepts(call) -> str | None:
    return None if call.asked_by_name and call.device == "cpu" else "emulation is for tests"

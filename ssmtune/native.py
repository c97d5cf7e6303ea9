"""The compiled kernels: finds and loads ssmtune/_C.so, which defines the operators torch.ops.ssmtune_native.*

ssmtune/_C_cuda.so brings the same operators for tensors on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

LIBRARY = Path(os.environ.get("SSMTUNE_LIBRARY") or Path(__file__).with_name("_C.so"))
CUDA_LIBRARY = LIBRARY.with_name("_C_cuda.so")

_loaded = False
_reason: str | None = None
_cuda_loaded = False
_cuda_reason: str | None = None


def load() -> None:
    """Load the compiled kernels if they are there; never raises, and does its work once.

    Without them every operator still runs, on the plain PyTorch reference. `why_not` has the reason.
    """
    global _loaded, _reason
    if _loaded or _reason is not None:
        return
    if os.environ.get("SSMTUNE_NO_NATIVE", "0") not in ("", "0"):
        _reason = "switched off by SSMTUNE_NO_NATIVE; unset it to use the compiled kernels"
        return
    if not LIBRARY.is_file():
        _reason = (
            f"not built: {LIBRARY} is missing\n"
            "  Install a C++ compiler, then run `SSMTUNE_BUILD=require pip install -v .` in the source folder:\n"
            "  it builds the kernels or says what it lacks."
        )
        return

    _reason = _open(LIBRARY, "It needs torch >= 2.10 and the kind of machine it was built on")
    _loaded = _reason is None


def _open(library: Path, needs: str) -> str | None:
    import torch

    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return (
            f"{library} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}\n"
            f"  {needs}; reinstall ssmtune to build it again."
        )
    return None


def is_loaded() -> bool:
    """Whether the compiled kernels are in use; loads them at the first call."""
    load()
    return _loaded


def why_not() -> str | None:
    """Why the compiled kernels are not in use and how to get them, or None when they are."""
    load()
    return _reason


def operator(name: str) -> Callable:
    """The compiled operator of this name, of the library that is loaded.

    Raises:
        RuntimeError: the library was built from other sources, which had no such operator.
    """
    import torch

    try:
        return getattr(torch.ops.ssmtune_native, name)
    except AttributeError:
        raise RuntimeError(
            f"{LIBRARY} has no operator {name}: it was built from older sources than this ssmtune.\n"
            "  Run `SSMTUNE_BUILD=require pip install -v .` in the source folder to build it again, or set\n"
            "  SSMTUNE_NO_NATIVE=1 to do without it."
        ) from None


def cpu_capability() -> str | None:
    """Instruction set of the compiled kernels in use: avx512_bf16, avx512, avx2, default, or None without them."""
    if not is_loaded():
        return None

    import torch

    return torch.ops.ssmtune_native.cpu_capability()


def cuda_why_not() -> str | None:
    """Why the compiled CUDA kernels are not in use and how to get them, or None when they are.

    They are loaded at the first call.
    """
    global _cuda_loaded, _cuda_reason
    if not _cuda_loaded and _cuda_reason is None:
        _cuda_reason = why_not() or _load_cuda()
        _cuda_loaded = _cuda_reason is None
    return _cuda_reason


def _load_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return (
            f"not in use: torch {torch.__version__} is built without CUDA\n"
            "  Install a torch that is built with it, then ssmtune again."
        )
    if not CUDA_LIBRARY.is_file():
        return (
            f"not built: {CUDA_LIBRARY} is missing\n"
            "  Install the CUDA toolkit, then run `SSMTUNE_CUDA=1 pip install -v .` in the source folder:\n"
            "  it builds the kernels or says what it lacks."
        )
    reason = _open(CUDA_LIBRARY, "It needs torch >= 2.10")
    if reason is None and torch.cuda.is_available():
        cannot_run = torch.ops.ssmtune_native.cuda_why_not()
        if cannot_run:
            major, minor = torch.cuda.get_device_capability()
            remedy = f"Reinstall ssmtune with SSMTUNE_CUDA_ARCHS={major}{minor}, or update the driver."
            if "shared memory" in cannot_run:
                remedy = "The Triton kernels run there."
            reason = (
                f"{CUDA_LIBRARY}, built for {cuda_architectures()}, does not run on sm_{major}{minor}: {cannot_run}\n"
                f"  {remedy}"
            )
    return reason


def cuda_architectures() -> str | None:
    """What the loaded CUDA kernels were compiled for ("sm_80, sm_90 and PTX"), None without them."""
    import torch

    try:
        return torch.ops.ssmtune_native.cuda_architectures()
    except AttributeError:
        return None

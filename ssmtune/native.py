"""The compiled kernels: finds and loads ssmtune/_C.so, which defines the operators torch.ops.ssmtune_native.*"""

from __future__ import annotations

import os
from pathlib import Path

LIBRARY = Path(os.environ.get("SSMTUNE_LIBRARY") or Path(__file__).with_name("_C.so"))

_loaded = False
_reason: str | None = None


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

    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        _reason = (
            f"{LIBRARY} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}\n"
            "  It needs torch >= 2.10 and the kind of machine it was built on; reinstall ssmtune to build it again."
        )
        return
    _loaded = True


def is_loaded() -> bool:
    """Whether the compiled kernels are in use; loads them at the first call."""
    load()
    return _loaded


def why_not() -> str | None:
    """Why the compiled kernels are not in use and how to get them, or None when they are."""
    load()
    return _reason


def cpu_capability() -> str | None:
    """Instruction set of the compiled kernels in use ("avx512", "avx2" or "default"), None without them."""
    if not is_loaded():
        return None

    import torch

    return torch.ops.ssmtune_native.cpu_capability()

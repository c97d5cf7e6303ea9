"""Plain C++ loops, compiled here and now with the compiler's own vectoriser: forward only."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("plain_scan.cpp")
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# without -ffast-math, which would link start-up code that turns subnormal numbers off in the process that loads it
LINK = ("-shared", "-fopenmp")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def why_not() -> str | None:
    """None where the loops compile, else the reason."""
    if _compiler() is None:
        return "no C++ compiler found (install g++, or set CXX)"
    try:
        library()
    except subprocess.CalledProcessError as error:
        return f"{SOURCE.name} did not compile: {error.stderr.strip().splitlines()[-1]}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops, kept in the temporary directory of this user until the source or the compiler changes.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its words are in `stderr`.
    """
    command = [_compiler(), *COMPILE, *LINK]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ssmtune-peers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"plain_scan-{key}.so"
    if not target.exists():
        compiled, partial = (folder / f"{target.stem}.{os.getpid()}.{kind}" for kind in ("o", "so"))
        for words in ((*COMPILE, str(SOURCE), "-o", str(compiled)), (*LINK, str(compiled), "-o", str(partial))):
            subprocess.run([_compiler(), *words], check=True, capture_output=True, text=True)
        compiled.unlink()
        partial.replace(target)
    return ctypes.CDLL(str(target))


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """The loops of plain_scan.cpp on channels-first inputs, with as many threads as PyTorch has.

    Raises:
        ValueError: u, delta or z is not contiguous. A copy would be timed as if it belonged to the loops.
    """
    if not (u.is_contiguous() and delta.is_contiguous() and z.is_contiguous()):
        raise ValueError(
            "plain C++ takes contiguous channels-first u, delta and z, got strides "
            f"{u.stride()}, {delta.stride()}, {z.stride()}.\n  Call ScanInputs.channels_first() first."
        )
    batch, dim, seqlen = u.shape
    out = torch.empty_like(u)
    B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()  # small: 2 dstate of 3 dim + 2 dstate rows
    arguments = (u, delta, A, B, C, D, z, delta_bias, out)
    sizes = (batch, dim, seqlen, A.shape[1])
    library().plain_scan(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments),
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out

"""Memory of a training process: kept once it has been used, and fetched in huge pages.

glibc hands large blocks back to the kernel at once, and the kernel clears every page of the next one. Each step of a
training allocates the same tensors again: that can cost a tenth of its time, and on a virtual machine half of it.
"""

import ctypes
import os
import sys

# of glibc's malloc.h, with the largest values that mallopt takes
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
OPTIONS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Have this process reuse the memory it frees; call it before torch is imported.

    The variables that set the same from outside (MALLOC_*, GLIBC_TUNABLES, THP_MEM_ALLOC_ENABLE) go first.

    Returns:
        Whether the options of malloc were set: False without glibc, or where a variable sets them.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in OPTIONS.items())

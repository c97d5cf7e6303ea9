"""The Triton kernels that a call launches, compiled for a GPU that need not be there.

Works on tensors of the device "meta", in a process where TRITON_INTERPRET is not set.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """A kernel that would have been launched.

    Attributes:
        arguments: of the kernel by name, its meta-parameters among them.
        grid: how many programs there are, along each axis.
        compiled: what triton made of it: `asm` holds the code, `metadata` the shared memory and the warps.
    """

    kernel: str
    arguments: dict[str, object]
    grid: tuple[int, ...]
    compiled: CompiledKernel


class _Driver:
    """What triton asks of a GPU before it compiles."""

    def __init__(self, name: str):
        self._name = name

    def get_current_device(self) -> str:
        return self._name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Compile for a target what the body launches, specialized as at run time, and launch nothing."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = inspect.signature(self.fn).parameters
        arguments = dict(zip(names, args, strict=False)) | {name: x for name, x in kwargs.items() if name in names}
        programs = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self.__name__, arguments, tuple(programs), compiled))
        return compiled

    with patch.object(driver, "_active", _Driver(target)), patch.object(JITFunction, "run", compile_only):
        yield launches

"""Peak memory of a piece of work on the CPU, in a process of its own."""

import gc
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def _high_water() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _probe(connection, function: Callable[..., Iterator[None]], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        run = function(*arguments)
        next(run)
        gc.collect()
        reset = Path("/proc/self/clear_refs")
        if os.access(reset, os.W_OK):
            reset.write_text("5")  # VmHWM starts again from what is resident now
        before = _high_water()
        next(run, None)
        connection.send(_high_water() - before)
    except Exception as failure:  # the parent reports it with the name of the case
        connection.send(failure)
        raise


def peak_memory(function: Callable[..., Iterator[None]], *arguments: Any, threads: int = 1) -> int:
    """Peak memory of the second part of a generator, above what is resident after the first, in a process of its own.

    Args:
        function: module-level generator function: builds its inputs, warms up, yields once, does the work, ends.
        arguments: what it is called with.
        threads: PyTorch threads in that process.

    Returns:
        Bytes.

    Raises:
        RuntimeError: the process died, most likely for want of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(theirs, function, arguments, threads))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = RuntimeError(
            f"{function.__name__}{arguments} died while its peak memory was measured.\n"
            "  It probably ran out of memory. Measure a smaller shape."
        )
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer

"""Cases in processes of their own: one for each backend, so that none runs in a heap that another has left behind.

What is fixed when a process starts, the instruction set and the memory allocator, has a tag of its own.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ssmtune.measure.scan_cases import forget_inputs
from ssmtune.measure.session import Session
from ssmtune.measure.specs import Spec
from ssmtune.measure.timing import Case, Lap

KEPT = "memory-kept"
ENVIRONMENTS = {
    "avx2": {"SSMTUNE_CPU_CAPABILITY": "avx2"},
    # glibc gives large blocks back at once, and the next one of that size is page after page of fresh zeros
    KEPT: {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
"""Environment variables of the processes in which the cases with that tag run."""

SETTLE = 0.02
"""Seconds between the turns of two processes: OpenMP threads that have run out of work wait busily for a while."""

WARM_AGAIN_BELOW = 0.2
"""Seconds of a run that cold caches would falsify."""


def _obey(cases: dict[Spec, Case], order: str, *arguments: object) -> object:
    if order == "forget":
        (free,) = arguments
        cases.clear()
        return free()
    spec, *rest = arguments
    if spec not in cases:
        cases[spec] = spec.case()
    answer = getattr(cases[spec], order)(*rest)
    if order == "values":
        values, seconds = answer
        return {name: value.numpy() for name, value in values.items()}, seconds
    return answer


def _serve(connection: Connection) -> None:
    cases: dict[Spec, Case] = {}
    while True:
        try:
            threads, *order = connection.recv()
        except EOFError:
            return
        try:
            torch.set_num_threads(threads)
            answer = _obey(cases, *order)
        except Exception as failure:  # raised again where the order was given
            answer = failure
        connection.send(answer)


@contextmanager
def _changed(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class Worker:
    """A process that runs cases, started with some environment variables."""

    def __init__(self, environment: dict[str, str], preload: str):
        self.environment = environment
        # a fork of a server that has imported everything starts at once, but it has the variables of that server
        context = multiprocessing.get_context("spawn" if environment else "forkserver")
        if not environment:
            context.set_forkserver_preload([preload])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _changed(environment):
            self.process.start()
        theirs.close()

    def ask(self, threads: int, order: str, *arguments: object) -> object:
        """Have the process do something, and wait for the answer.

        Raises:
            RuntimeError: the process died.
        """
        try:
            self.connection.send((threads, order, *arguments))
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            variables = "".join(f"{name}={value} " for name, value in self.environment.items())
            raise RuntimeError(
                f"the process of {arguments[:1]} died, most likely for want of memory.\n"
                f"  Measure less at a time, or run `{variables}python -m ssmtune env` to see whether it starts at all."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


class RemoteCase:
    """A spec that runs in a worker; measured there, so that the pipe costs nothing.

    A short run that follows one of another process is done twice, and counts the second time: the other has left its
    threads waiting and its data in the caches, which would always fall on the same case.
    """

    def __init__(self, workers: "Workers", worker: Worker, spec: Spec):
        self.workers, self.worker, self.spec = workers, worker, spec
        self.label, self.stages = spec.label, spec.stages

    def time(self) -> list[Lap]:
        if self.workers.last_timed is not self.worker:
            self.workers.last_timed = self.worker
            time.sleep(SETTLE)
            first = self._time()
            if sum(lap.wall for lap in first) >= WARM_AGAIN_BELOW:
                return first
        return self._time()

    def _time(self) -> list[Lap]:
        return self.worker.ask(self.workers.threads, "time", self.spec)

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        values, seconds = self.worker.ask(self.workers.threads, "values", self.spec, channels)
        return {name: torch.from_numpy(value) for name, value in values.items()}, seconds

    def losses(self) -> list[float]:
        """Of a training step: the loss of each run so far."""
        return self.worker.ask(self.workers.threads, "losses", self.spec)


class Workers:
    """One process for each backend and environment, started when its first case is asked for; a context manager.

    Attributes:
        threads: PyTorch threads of what they run next.
        last_timed: the process that ran a case last.
    """

    def __init__(self) -> None:
        self.threads = 1
        self.last_timed: Worker | None = None
        self._running: dict[tuple[str, str], Worker] = {}

    def case(self, spec: Spec) -> RemoteCase:
        """A spec made ready to run in the process that it belongs to."""
        tag = next((tag for tag in spec.tags if tag in ENVIRONMENTS), "")
        if (spec.backend, tag) not in self._running:
            self._running[spec.backend, tag] = Worker(ENVIRONMENTS.get(tag, {}), type(spec).__module__)
        return RemoteCase(self, self._running[spec.backend, tag], spec)

    def forget(self, free: Callable[[], None]) -> None:
        """Drop the cases of every process, and call a module-level function there that frees what they shared."""
        for worker in self._running.values():
            worker.ask(self.threads, "forget", free)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            worker.close()


class WorkerSession(Session):
    """A session whose cases run in processes of their own, which live as long as its context."""

    def __enter__(self) -> "WorkerSession":
        self.workers = Workers()
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.__exit__()

    def _case(self, spec: Spec) -> Case:
        return self.workers.case(spec)

    def _use_threads(self, count: int) -> None:
        self.workers.threads = count

    def _forget(self) -> None:
        self.workers.forget(forget_inputs)

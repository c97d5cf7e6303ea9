"""Cases in a process of their own, for what is fixed when a process starts: instruction set and memory allocator."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.measure import Lap
from benchmarks.scan_cases import ScanCase, Spec, forget_inputs

ENVIRONMENTS = {
    "avx2": {"SSMTUNE_CPU_CAPABILITY": "avx2"},
    # glibc gives every block above 32 MiB back at once, and the next one of that size is page after page of fresh zeros
    "memory-kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
"""Environment variables of the processes in which the cases with that tag run."""


def _run(cases: dict[Spec, ScanCase], order: str, spec: Spec, channels: slice | None) -> object:
    if spec not in cases:
        cases[spec] = ScanCase(spec)
    if order == "time":
        return cases[spec].time()
    values, seconds = cases[spec].values(channels)
    return {name: value.numpy() for name, value in values.items()}, seconds


def _serve(connection: Connection) -> None:
    cases: dict[Spec, ScanCase] = {}
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if order == "threads":
                answer = torch.set_num_threads(*arguments)
            elif order == "forget":
                cases.clear()
                answer = forget_inputs()
            else:
                answer = _run(cases, order, *arguments)
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
    """A process started with some environment variables; a context manager."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def __enter__(self) -> "Worker":
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _changed(self.environment):
            self.process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join()

    def ask(self, *order: object) -> object:
        """Have the process do something, and wait for the answer.

        Raises:
            RuntimeError: the process died.
        """
        try:
            self.connection.send(order)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            variables = " ".join(f"{name}={value}" for name, value in self.environment.items())
            raise RuntimeError(
                f"the process with {variables} died.\n  Run `{variables} python -m ssmtune env` to see why."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class RemoteCase:
    """A spec that runs in a worker; measured there, so that the pipe costs nothing."""

    def __init__(self, worker: Worker, spec: Spec):
        self.worker, self.spec = worker, spec
        self.label = f"{spec.backend} {spec.direction} {spec.shape} {spec.variant}"
        self.stages = ("fwd", "bwd") if spec.wrt else ("fwd",)

    def time(self) -> list[Lap]:
        return self.worker.ask("time", self.spec, None)

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        values, seconds = self.worker.ask("values", self.spec, channels)
        return {name: torch.from_numpy(value) for name, value in values.items()}, seconds

"""The CPU kernels at another instruction set, in a process of their own: it is chosen once, when they are loaded."""

import multiprocessing
import os
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.measure import Lap
from benchmarks.scan_cases import ScanCase, Spec, forget_inputs

VARIABLE = "SSMTUNE_CPU_CAPABILITY"


def _run(cases: dict[Spec, ScanCase], order: str, spec: Spec) -> object:
    if spec not in cases:
        cases[spec] = ScanCase(spec)
    if order == "time":
        return cases[spec].time()
    values, seconds = cases[spec].values()
    return {name: value.numpy() for name, value in values.items()}, seconds


def _serve(connection: Connection) -> None:
    cases: dict[Spec, ScanCase] = {}
    while True:
        try:
            order, argument = connection.recv()
        except EOFError:
            return
        if order == "threads":
            answer = torch.set_num_threads(argument)
        elif order == "forget":
            cases.clear()
            answer = forget_inputs()
        else:
            try:
                answer = _run(cases, order, argument)
            except Exception as failure:  # raised again where the order was given
                answer = failure
        connection.send(answer)


class Worker:
    """A process whose kernels run at `capability`; a context manager."""

    def __init__(self, capability: str):
        self.capability = capability

    def __enter__(self) -> "Worker":
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.capability
        try:
            self.process.start()
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join()

    def ask(self, order: str, argument: object = None) -> object:
        """Have the process do something, and wait for the answer.

        Raises:
            RuntimeError: the process died.
        """
        try:
            self.connection.send((order, argument))
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"the process with {VARIABLE}={self.capability} died.\n"
                f"  Run `{VARIABLE}={self.capability} python -m ssmtune env` to see why."
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
        return self.worker.ask("time", self.spec)

    def values(self) -> tuple[dict[str, Tensor], float]:
        values, seconds = self.worker.ask("values", self.spec)
        return {name: torch.from_numpy(value) for name, value in values.items()}, seconds

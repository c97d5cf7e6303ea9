"""Where the cells of a sweep run: in this process, or in several that are handed one after the other.

Workers take a cell with `start`, and `finished` waits for the record of whichever is done first.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ssmtune.cell_runner import CellRunner, failure, now
from ssmtune.cells import Cell

if TYPE_CHECKING:
    from ssmtune.comparison import ComparisonConfig


class Workers(Protocol):
    """Takes cells and gives records; at most `slots` cells are with it at a time."""

    slots: int

    def start(self, cell: Cell) -> None: ...

    def finished(self) -> tuple[Cell, dict[str, Any]]: ...

    def close(self) -> None: ...


class ThisProcess:
    """Runs a cell when its record is asked for."""

    slots = 1

    def __init__(self, runner: CellRunner):
        self.runner = runner

    def start(self, cell: Cell) -> None:
        self.cell = cell

    def finished(self) -> tuple[Cell, dict[str, Any]]:
        return self.cell, self.runner.run(self.cell)

    def close(self) -> None:
        pass


class CellLoop:
    """What a process that is handed cells does with them: load the model when the first comes, and run each."""

    def __init__(self, config: ComparisonConfig, out: Path, backend: str | None):
        self.config, self.out, self.backend = config, out, backend
        self.runner: CellRunner | None = None

    def run(self, cell: Cell) -> dict[str, Any] | Exception:
        """The record of a cell, or the error that ends the sweep."""
        import transformers

        from ssmtune import ops

        transformers.utils.logging.disable_progress_bar()
        try:
            with ops.backend(self.backend) if self.backend else nullcontext():
                self.runner = self.runner or CellRunner(self.config, self.out)
                return self.runner.run(cell)
        except (OSError, RuntimeError, ValueError) as error:
            return error


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    cell: Cell | None = None


class Processes:
    """Several processes on this machine, which share its threads, and have one of its GPUs each or share them too.

    A process that dies, of a lack of memory for example, is a failed cell, and another takes its place.
    """

    def __init__(self, runner: CellRunner, count: int):
        import torch

        from ssmtune.ops.backends import backend_asked_for

        self.slots = count
        threads = max(1, torch.get_num_threads() // count)
        self.runner = runner
        self.arguments = (runner.config, runner.out, threads, backend_asked_for())
        self.workers: list[_Worker] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        self.gpus = itertools.cycle(visible.split(","))

    def start(self, cell: Cell) -> None:
        worker = next((worker for worker in self.workers if worker.cell is None), None) or self._new()
        try:
            worker.pipe.send(cell)
        except OSError:
            # it died while it had nothing to do
            self.workers.remove(worker)
            return self.start(cell)
        worker.cell = cell

    def finished(self) -> tuple[Cell, dict[str, Any]]:
        first = wait([worker.pipe for worker in self.workers if worker.cell is not None])[0]
        worker = next(worker for worker in self.workers if worker.pipe is first)
        cell, worker.cell = worker.cell, None
        try:
            outcome = worker.pipe.recv()
        except (EOFError, OSError):
            self.workers.remove(worker)
            worker.process.join()
            return cell, self.runner.record(cell, failure(_how_it_ended(worker.process.exitcode)), now())
        if isinstance(outcome, Exception):
            raise outcome
        return cell, outcome

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()

    def _new(self) -> _Worker:
        # fork would copy the locks of torch's threads as they happen to be
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, next(self.gpus), *self.arguments), daemon=True)
        process.start()
        # so that the end of the process is the end of the pipe
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]


def _work(pipe: Connection, gpu: str, config: ComparisonConfig, out: Path, threads: int, backend: str | None) -> None:
    # Ctrl-C reaches every process of the terminal; the one that handed out the cells decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # before the first call of CUDA; Trainer takes the first GPU that it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    loop = CellLoop(config, out, backend)
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        pipe.send(loop.run(cell))


def _end_with_parent() -> None:
    """Nothing may run on behalf of a sweep that was killed: the next one runs the same cells."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the process of this run was ended by {name}{hint}.\n  Try fewer --processes or a smaller --batch-size."
    return f"the process of this run ended with status {status}.\n  Try it with --processes 1 to see why."

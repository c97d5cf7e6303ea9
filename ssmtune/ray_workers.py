"""Workers on a Ray cluster: the same cells on many machines, with the same results.

The machines share the comparison's directory, through which trained weights come back; records travel with Ray.
"""

from __future__ import annotations

import logging
import platform
from typing import Any

from ssmtune.cell_runner import CellRunner, failure, now
from ssmtune.cell_workers import CellLoop
from ssmtune.cells import Cell
from ssmtune.comparison_directory import FILE
from ssmtune.config import ConfigError


class SharedLoop(CellLoop):
    """A loop on a machine that may not see the comparison's directory."""

    def run(self, cell: Cell) -> dict[str, Any] | Exception:
        if not (self.out / FILE).is_file():
            return ConfigError(
                f"{self.out} is not the comparison's directory on {platform.node()}, where Ray runs a worker.\n"
                "  Trained weights come back through it. Give an --out on a file system that all machines share."
            )
        return super().run(cell)


class RayWorkers:
    """Actors, each of which loads the base model once and runs one cell at a time.

    A machine that is lost is a failed cell, and another actor takes its place.

    Args:
        runner: of this process.
        count: how many actors.
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for a new one here.
    """

    def __init__(self, runner: CellRunner, count: int, address: str):
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "--ray needs the package ray, which is not installed.\n  Run: pip install 'ssmtune[ray]'"
            ) from None
        from ssmtune.ops.backends import backend_asked_for

        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster was found at {address!r} ({error}).\n"
                "  Start one with `ray start --head`, or use --ray local for one on this machine."
            ) from None
        self.ray, self.runner, self.slots = ray, runner, count
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < count:
            self.close()
            raise ConfigError(
                f"the Ray cluster at {address!r} has {resources.get('CPU', 0):.0f} cores for {count} runs at a time.\n"
                "  Each takes one. Give fewer --processes."
            )
        gpus = min(1.0, resources.get("GPU", 0) / count)
        self.actor = ray.remote(num_cpus=1, num_gpus=gpus)(SharedLoop)
        self.arguments = (runner.config, runner.out, backend_asked_for())
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, Cell]] = {}

    def start(self, cell: Cell) -> None:
        actor = self.idle.pop() if self.idle else self.actor.remote(*self.arguments)
        self.running[actor.run.remote(cell)] = (actor, cell)

    def finished(self) -> tuple[Cell, dict[str, Any]]:
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        actor, cell = self.running.pop(done[0])
        try:
            outcome = self.ray.get(done[0])
        except self.ray.exceptions.RayActorError as error:
            lost = f"the Ray worker of this run was lost: {str(error).splitlines()[0]}"
            return cell, self.runner.record(cell, failure(lost), now())
        self.idle.append(actor)
        if isinstance(outcome, Exception):
            raise outcome
        return cell, outcome

    def close(self) -> None:
        self.ray.shutdown()

"""A case by name: which call, on which sizes, by which implementation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssmtune.measure.inputs import Shape
from ssmtune.measure.timing import Case

OURS = ("cpu", "triton", "cuda", "reference")
"""Backends of ssmtune's operators; every other backend of a spec is a peer."""

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Tags of the cases whose sequences have another dtype than float32."""


@dataclass(frozen=True)
class Spec:
    """A case by name: hashable, and small enough to be sent to another process that builds it.

    `tags` are what differs from the default.
    """

    op: ClassVar[str]
    unit: ClassVar[str] = "ms"
    repeats: ClassVar[int] = 1  # calls in one timed run

    shape: Shape
    direction: str  # fwd or fwdbwd
    backend: str = "cpu"
    tags: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def variant(self) -> str:
        """The tags as one entry of a table."""
        return " ".join(self.tags) or "default"

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.backend} {self.op} {self.direction} {self.shape} {self.variant}"

    @property
    def stages(self) -> tuple[str, ...]:
        """What one run consists of."""
        return ("fwd",) if self.direction == "fwd" else ("fwd", "bwd")

    @property
    def dtype(self) -> torch.dtype:
        """Of the sequences."""
        return next((HALVES[tag] for tag in self.tags if tag in HALVES), torch.float32)

    @property
    def wrt(self) -> tuple[str, ...]:
        """Names of the inputs whose gradients are asked for."""
        return ()

    @property
    def columns(self) -> dict[str, str | int]:
        """Of its rows."""
        return {
            "op": self.op,
            "pass_": self.direction,
            "backend": self.backend,
            "dtype": str(self.dtype).removeprefix("torch."),
            **vars(self.shape),
            "variant": self.variant,
        }

    def case(self) -> Case:
        """Make it ready to run, here."""
        raise NotImplementedError

    def oracle(self) -> "Spec":
        """The spec whose `expected` holds the results of this one."""
        raise NotImplementedError

    def expected(self, channels: slice | None = None) -> dict[str, Tensor]:
        """The results in float64, by name; with `channels`, of those only, which leaves out sums over all channels."""
        raise NotImplementedError


def available(op: str, device: str) -> list[str]:
    """The kernels of ssmtune for an operator that run here on a device; the reference where there are none."""
    from ssmtune.ops import available_backends

    kinds = ("cpu",) if device == "cpu" else ("cuda", "triton")
    reasons = available_backends(op)
    return [name for name in kinds if reasons[name] is None] or ["reference"]

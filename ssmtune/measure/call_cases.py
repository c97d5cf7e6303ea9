"""A function made ready to be timed: what it computes is checked against the same in float64 first."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssmtune.measure.timing import Lap, gpu_peak_memory, laps


@dataclass
class CallCase:
    """A call, and the gradients of what it returns where `inputs` ask for any.

    Args:
        label: what messages call it.
        call: returns the result.
        inputs: tensors, by name, whose gradients are part of the work.
        gradient: of the result; needed with `inputs`.
        device: where it runs, cpu or cuda.
    """

    label: str
    call: Callable[[], Tensor]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None
    device: str = "cpu"
    _results: list[Tensor] = field(default_factory=list, init=False)

    @property
    def stages(self) -> tuple[str, ...]:
        """What one run consists of."""
        return ("fwd", "bwd") if self.inputs else ("fwd",)

    def run(self) -> Iterator[None]:
        """Forward, then backward where there are inputs, with a yield after each."""
        with torch.set_grad_enabled(bool(self.inputs)):
            out = self.call()
        yield
        gradients: tuple[Tensor, ...] = ()
        if self.inputs:
            gradients = torch.autograd.grad(out, list(self.inputs.values()), self.gradient)
            yield
        self._results = [out.detach(), *gradients]

    def time(self) -> list[Lap]:
        measured = laps(self.run(), self.device)
        self._results = []
        return measured

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        start = time.perf_counter()
        for _ in self.run():
            pass
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        results, self._results = self._results, []
        return dict(zip(("out", *self.inputs), results, strict=True)), seconds

    def peak(self) -> int:
        """Run once on a GPU: its peak memory in bytes, results included."""
        peak = gpu_peak_memory(self.run())
        self._results = []
        return peak

"""One decoding step of the recurrence, timed over many, with one adapter for all rows or one of many for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ssmtune.measure.call_cases import CallCase
from ssmtune.measure.inputs import Shape
from ssmtune.measure.peers import mamba_ssm_scan
from ssmtune.measure.specs import OURS, Spec
from ssmtune.measure.timing import Lap

TIMED_CHANNELS = 2**18
"""Channels that one timed run advances: a single step is shorter than a clock can tell."""

VERIFIED_STEPS = 3
ADAPTERS = 64


@dataclass(frozen=True)
class UpdateSpec(Spec):
    """A step of `shape` with seqlen 1. `tags` may hold one-adapter or 64-adapters, and those of the dtype of x.

    Every other backend than ours is transformers, or, on a GPU, mamba_ssm's Triton kernel.
    """

    op: ClassVar[str] = "selective_state_update"
    unit: ClassVar[str] = "us"

    direction: str = "fwd"

    @property
    def repeats(self) -> int:
        """Steps in one timed run."""
        return max(10, TIMED_CHANNELS // (self.shape.batch * self.shape.dim))

    def case(self) -> "UpdateCase":
        return UpdateCase(self)

    def oracle(self) -> "UpdateSpec":
        return replace(self, backend="reference")

    def expected(self, channels: slice | None = None) -> dict[str, Tensor]:
        return UpdateCase(self, torch.float64).values()[0]


class UpdateCase(CallCase):
    """A spec made ready to run: `values` are those of a few steps, `time` is that of one of many."""

    def __init__(self, spec: UpdateSpec, dtype: torch.dtype | None = None):
        self.spec = spec
        self.steps = VERIFIED_STEPS
        self.step = _step(spec.backend)
        self.inputs_of_step = _inputs(spec, dtype)
        self.start = self.inputs_of_step.pop("state")
        super().__init__(spec.label, self.decode, device=spec.device)

    def decode(self) -> Tensor:
        """Take the steps from the same state; the last output and the state they lead to, as one tensor."""
        state = self.start.clone()
        for _ in range(self.steps):
            out = self.step(state, **self.inputs_of_step, dt_softplus=True)
        return torch.cat([out.flatten().to(state.dtype), state.flatten()])

    def time(self) -> list[Lap]:
        self.steps = self.spec.repeats
        try:
            return super().time()
        finally:
            self.steps = VERIFIED_STEPS

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        named, seconds = super().values()
        return {name: value.cpu() for name, value in named.items()}, seconds * self.spec.repeats / VERIFIED_STEPS


def peers(shape: Shape, device: str, half: tuple[str, ...] = ()) -> list[UpdateSpec]:
    """The same step by another implementation that runs here: in a half type by the one that adds up in float32."""
    if device == "cuda" and mamba_ssm_scan.why_not() is None:
        return [UpdateSpec(shape, "fwd", "mamba_ssm", half, device)]
    return [UpdateSpec(shape, "fwd", "transformers", (), device)]


def _step(backend: str) -> Callable[..., Tensor]:
    if backend in OURS:
        from ssmtune.ops import selective_state_update

        return lambda state, x, **inputs: selective_state_update(state, x, **inputs, backend=backend)
    if backend == "mamba_ssm":
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        return selective_state_update
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    return lambda state, x, **inputs: mamba_selective_state_update(state, x, **inputs)


def _inputs(spec: UpdateSpec, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """In float32 with x, dt, B, C and z in the dtype of the spec; or, rounded to it first, all in `dtype`."""
    batch, dim, dstate = spec.shape.batch, spec.shape.dim, spec.shape.dstate
    generator = torch.Generator(spec.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=spec.device)

    inputs = {
        "state": random(batch, dim, dstate),
        "x": random(batch, dim),
        "dt": random(batch, dim) - 3,
        "A": -torch.arange(1.0, dstate + 1, device=spec.device).repeat(dim, 1),
        "B": random(batch, dstate),
        "C": random(batch, dstate),
        "D": random(dim),
        "z": random(batch, dim),
        "dt_bias": 0.1 * random(dim),
    }
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(spec.dtype)
    if "one-adapter" in spec.tags:
        inputs["state_offset"] = random(dim, dstate)
    if "64-adapters" in spec.tags:
        inputs["state_offset"] = random(ADAPTERS, dim, dstate)
        index = torch.randperm(max(ADAPTERS, batch), generator=generator, device=spec.device)[:batch] % ADAPTERS
        if dtype is None:
            inputs["adapter_index"] = index
        else:  # what the index stands for
            inputs["state_offset"] = inputs["state_offset"][index]
    if dtype is not None:
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
    return inputs

"""One timed selective scan: what is called, on which inputs, for which gradients; and what is right for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.call_cases import CallCase
from benchmarks.peers import PEERS
from benchmarks.shapes import FROZEN, FULL, ScanInputs, Shape, make_inputs

OURS = ("cpu", "triton", "cuda", "reference")
"""Backends of ssmtune.selective_scan; every other backend of a spec is a peer."""

SEQUENCES = ("out", "u", "delta", "z")
"""Results of shape (batch, dim, seqlen)."""

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Tags of the cases whose sequences have another dtype than float32."""

BLOCK_ELEMENTS = 2**24
"""States of a whole sequence that `expected` handles at once: 128 MiB in float64 for each tensor autograd saves."""


@dataclass(frozen=True)
class Spec:
    """A case by name, so that another process can build it.

    `tags` are what differs from the default (channels-last, no state inputs, weights frozen): full, channels-first,
    initial-state, state-offset, offset-only, bfloat16, float16, and those of `worker.ENVIRONMENTS`.
    """

    shape: Shape
    direction: str  # fwd or fwdbwd
    backend: str = "cpu"
    tags: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def variant(self) -> str:
        """The tags as one word of a table."""
        return " ".join(self.tags) or "default"

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.backend} {self.direction} {self.shape} {self.variant}"

    @property
    def stages(self) -> tuple[str, ...]:
        """What one run consists of."""
        return ("fwd",) if self.direction == "fwd" else ("fwd", "bwd")

    def case(self) -> "ScanCase":
        """Make it ready to run, here."""
        return ScanCase(self)

    @property
    def wrt(self) -> tuple[str, ...]:
        """Names of the inputs whose gradients are asked for."""
        if self.direction == "fwd":
            return ()
        if "offset-only" in self.tags:
            return ("state_offset",)
        states = tuple(tag.replace("-", "_") for tag in ("initial-state", "state-offset") if tag in self.tags)
        return (FULL if "full" in self.tags else FROZEN) + states

    def oracle(self) -> "Spec":
        """The spec whose results hold those of this one: the same scan, with every gradient there is."""
        states = (self.has_initial_state, "initial-state"), (self.has_state_offset, "state-offset")
        kept = (*(tag for there, tag in states if there), *(tag for tag in self.tags if tag in HALVES))
        return Spec(self.shape, "fwdbwd", "reference", ("full", *kept))

    @property
    def dtype(self) -> torch.dtype:
        """Of the sequences."""
        return next((HALVES[tag] for tag in self.tags if tag in HALVES), torch.float32)

    @property
    def has_initial_state(self) -> bool:
        return "initial-state" in self.tags

    @property
    def has_state_offset(self) -> bool:
        return "state-offset" in self.tags or "offset-only" in self.tags


@cache
def _inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> ScanInputs:
    inputs = make_inputs(shape)
    return inputs if dtype == torch.float32 else inputs.with_sequences_in(dtype)


@cache
def _channels_first(shape: Shape, dtype: torch.dtype = torch.float32) -> ScanInputs:
    return _inputs(shape, dtype).channels_first()


def forget_inputs() -> None:
    """Free the inputs that are kept for the next case of the same shape."""
    _inputs.cache_clear()
    _channels_first.cache_clear()


class ScanCase(CallCase):
    """A spec made ready to run."""

    def __init__(self, spec: Spec):
        self.spec = spec
        source = _channels_first if "channels-first" in spec.tags else _inputs
        inputs = source(spec.shape, spec.dtype)
        inputs = inputs.with_only(initial_state=spec.has_initial_state, state_offset=spec.has_state_offset)
        inputs = inputs.to(spec.device).requiring(spec.wrt)
        self.arguments = inputs.arguments()
        super().__init__(
            spec.label,
            self.scan,
            {name: self.arguments[name] for name in spec.wrt},
            inputs.dout,
            **({} if spec.device == "cpu" else {"wait": torch.cuda.synchronize}),
        )

    def scan(self) -> Tensor:
        """The call that is timed."""
        if self.spec.backend in OURS:
            from ssmtune.ops import selective_scan

            return selective_scan(**self.arguments, delta_softplus=True, backend=self.spec.backend)
        return PEERS[self.spec.backend].scan(**self.arguments)

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        named, seconds = super().values()
        if channels is not None:
            named = {name: value[:, channels] for name, value in named.items() if name in SEQUENCES}
        return {name: value.float().cpu() for name, value in named.items()}, seconds


def expected(spec: Spec, channels: slice | None = None) -> dict[str, Tensor]:
    """The float64 recurrence and its gradients by autograd, a block of channels at a time.

    Args:
        spec: gradients and state inputs are taken from it; its backend does not matter.
        channels: look at these channels only, which leaves out the gradients that sum over all channels (B and C).

    Returns:
        "out" and every gradient by name, in float64.
    """
    from ssmtune.ops.reference import selective_scan_reference

    inputs = _inputs(spec.shape, spec.dtype)
    inputs = inputs.with_only(initial_state=spec.has_initial_state, state_offset=spec.has_state_offset)
    names = spec.wrt
    if channels is not None:
        inputs = inputs.channels(channels)
        names = tuple(name for name in names if name in SEQUENCES)
    batch, dim, seqlen = inputs.u.shape
    block = max(1, BLOCK_ELEMENTS // (batch * seqlen * spec.shape.dstate))
    blocks: dict[str, list[Tensor]] = {name: [] for name in ("out", *names)}
    for start in range(0, dim, block):
        part = inputs.channels(slice(start, start + block)).to(torch.float64).requiring(names)
        with torch.set_grad_enabled(bool(names)):
            out, _ = selective_scan_reference(**part.arguments(), delta_softplus=True)
        gradients = torch.autograd.grad(out, [part.tensors()[name] for name in names], part.dout) if names else ()
        for name, value in zip(("out", *names), (out.detach(), *gradients), strict=True):
            blocks[name].append(value)
    return {name: _join(name, values) for name, values in blocks.items()}


def _join(name: str, values: list[Tensor]) -> Tensor:
    if name in ("B", "C"):
        return torch.stack(values).sum(0)
    return torch.cat(values, dim=1 if name in SEQUENCES else 0)


def memory_probe(spec: Spec) -> Iterator[None]:
    """For `measure.peak_memory`: one run of a spec, after a tiny one that loads what has to be loaded."""
    ScanCase(replace(spec, shape=Shape(1, 16, 16, spec.shape.dstate))).values()
    forget_inputs()
    case = ScanCase(spec)
    yield
    case.values()

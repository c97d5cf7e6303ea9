"""One timed selective scan: what is called, on which inputs, for which gradients; and what is right for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ssmtune.measure.call_cases import CallCase
from ssmtune.measure.inputs import FROZEN, FULL, ScanInputs, Shape, make_inputs
from ssmtune.measure.peers import PEERS
from ssmtune.measure.specs import HALVES, OURS, Spec

SEQUENCES = ("out", "u", "delta", "z")
"""Results of shape (batch, dim, seqlen)."""

BLOCK_ELEMENTS = 2**24
"""States of a whole sequence that `expected` handles at once: 128 MiB in float64 for each tensor autograd saves."""


@dataclass(frozen=True)
class ScanSpec(Spec):
    """A scan.

    `tags` are what differs from the default (channels-last, no state inputs, weights frozen): full, channels-first,
    initial-state, state-offset, offset-only, bfloat16, float16, and whatever else sets processes apart.
    """

    op: ClassVar[str] = "selective_scan"

    def case(self) -> "ScanCase":
        return ScanCase(self)

    @property
    def wrt(self) -> tuple[str, ...]:
        if self.direction == "fwd":
            return ()
        if "offset-only" in self.tags:
            return ("state_offset",)
        states = tuple(tag.replace("-", "_") for tag in ("initial-state", "state-offset") if tag in self.tags)
        return (FULL if "full" in self.tags else FROZEN) + states

    def oracle(self) -> "ScanSpec":
        # the same scan with every gradient there is
        states = (self.has_initial_state, "initial-state"), (self.has_state_offset, "state-offset")
        kept = (*(tag for there, tag in states if there), *(tag for tag in self.tags if tag in HALVES))
        return ScanSpec(self.shape, "fwdbwd", "reference", ("full", *kept), self.device)

    def expected(self, channels: slice | None = None) -> dict[str, Tensor]:
        return expected(self, channels)

    @property
    def has_initial_state(self) -> bool:
        return "initial-state" in self.tags

    @property
    def has_state_offset(self) -> bool:
        return "state-offset" in self.tags or "offset-only" in self.tags


@cache
def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> ScanInputs:
    inputs = make_inputs(shape, device=device)
    return inputs if dtype == torch.float32 else inputs.with_sequences_in(dtype)


@cache
def _channels_first(shape: Shape, dtype: torch.dtype, device: str) -> ScanInputs:
    return _inputs(shape, dtype, device).channels_first()


def forget_inputs() -> None:
    """Free the inputs that are kept for the next case of the same shape."""
    _inputs.cache_clear()
    _channels_first.cache_clear()


class ScanCase(CallCase):
    """A spec made ready to run."""

    def __init__(self, spec: ScanSpec):
        self.spec = spec
        source = _channels_first if "channels-first" in spec.tags else _inputs
        inputs = source(spec.shape, spec.dtype, spec.device)
        inputs = inputs.with_only(initial_state=spec.has_initial_state, state_offset=spec.has_state_offset)
        inputs = inputs.requiring(spec.wrt)
        self.arguments = inputs.arguments()
        super().__init__(
            spec.label,
            self.scan,
            {name: self.arguments[name] for name in spec.wrt},
            inputs.dout,
            spec.device,
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


def expected(spec: ScanSpec, channels: slice | None = None) -> dict[str, Tensor]:
    """The float64 recurrence and its gradients by autograd, a block of channels at a time.

    Args:
        spec: gradients and state inputs are taken from it; its backend does not matter.
        channels: look at these channels only, which leaves out the gradients that sum over all channels (B and C).

    Returns:
        "out" and every gradient by name, in float64.
    """
    from ssmtune.ops.reference import selective_scan_reference

    inputs = _inputs(spec.shape, spec.dtype, spec.device)
    inputs = inputs.with_only(initial_state=spec.has_initial_state, state_offset=spec.has_state_offset)
    names = spec.wrt
    if channels is not None:
        inputs = inputs.channels(channels).to("cpu")  # so few that a GPU would only launch kernels
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
            blocks[name].append(value.cpu())
    return {name: _join(name, values) for name, values in blocks.items()}


def _join(name: str, values: list[Tensor]) -> Tensor:
    if name in ("B", "C"):
        return torch.stack(values).sum(0)
    return torch.cat(values, dim=1 if name in SEQUENCES else 0)


def memory_probe(spec: ScanSpec) -> Iterator[None]:
    """For `measure.peak_memory`: one run of a spec, after a tiny one that loads what has to be loaded."""
    ScanCase(replace(spec, shape=Shape(1, 16, 16, spec.shape.dstate))).values()
    forget_inputs()
    case = ScanCase(spec)
    yield
    case.values()

"""What a machine can do at best, measured on it, and the least time that leaves for an operator.

A scan moves every input and output once and takes, at every step and for every state, one exponential. On a GPU those
are the memory's bandwidth and the special-function units; on a CPU, which computes exp2 as a polynomial, the second is
the rate of its multiply-adds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssmtune.measure.specs import Spec
from ssmtune.measure.timing import laps
from ssmtune.measure.update_cases import ADAPTERS

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Many times the size of a cache."""

PRODUCT_SIZE = 1024
"""Rows and columns of the matrix product that stands for the multiply-adds of a CPU."""

RUNS = 10

# (for each state, for each step of a channel) of forward and backward
EX2_WORK = {"fwd": (1, 4), "bwd": (1, 4)}
"""softplus takes an ex2 and a lg2, the gate an ex2 and an rcp."""

FMA_WORK = {"fwd": (9, 35), "bwd": (16, 72)}
"""Counted in a vectorised scan whose exp2 is a polynomial of degree 5."""


@dataclass(frozen=True)
class Limits:
    """What a machine does in a second."""

    bandwidth: float  # bytes, read and written
    unit: str  # ex2 or fma
    rate: float | None  # of these; None where it could not be measured

    def __str__(self) -> str:
        rate = f"{self.rate / 1e9:,.0f} G{self.unit}/s" if self.rate else f"{self.unit} not measured"
        return f"copy {self.bandwidth / 1e9:,.0f} GB/s · {rate}"


def measure(device: str) -> Limits:
    """Measure the limits of this machine: the best of a few runs, on as many threads as PyTorch has."""
    size = COPY_BYTES[device]
    source, target = torch.zeros(2, size, dtype=torch.int8, device=device)
    copy = 2 * size / _seconds(lambda: target.copy_(source), device)
    if device == "cuda":
        return Limits(copy, "ex2", _ex2_rate())
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    return Limits(copy, "fma", PRODUCT_SIZE**3 / _seconds(lambda: a @ b, device))


def _seconds(call: Callable[[], object], device: str) -> float:
    def run():
        call()
        yield

    for _ in range(2):
        call()
    return min(laps(run(), device)[0].wall for _ in range(RUNS))


def _ex2_rate() -> float | None:
    try:
        from ssmtune.triton_kernels.exp2_rate import exp2_many
    except ImportError:
        return None
    counted = exp2_many()
    return counted / _seconds(exp2_many, "cuda")


def bounds(spec: Spec, limits: Limits) -> dict[str, float]:
    """The least milliseconds for a spec by each limit that applies to it; none where nothing is known of its kind."""
    if "offset-only" in spec.tags:
        return {}
    count = {"selective_scan": _scan, "causal_conv1d": _convolution, "selective_state_update": _update}[spec.op]
    traffic, work = count(spec, EX2_WORK if limits.unit == "ex2" else FMA_WORK)
    least = {"memory": 1e3 * traffic / limits.bandwidth}
    if work and limits.rate:
        least[limits.unit] = 1e3 * work / limits.rate
    return least


def _scan(spec: Spec, work: dict[str, tuple[int, int]]) -> tuple[int, int]:
    shape = spec.shape
    steps, row = shape.batch * shape.dim * shape.seqlen, 2 * shape.batch * shape.dstate * shape.seqlen
    # u, delta, z and out; then u, delta, z, dout and the gradients of the first three
    elements = {"fwd": 4 * steps + row, "bwd": 7 * steps + 2 * row}
    passes = ("fwd",) if spec.direction == "fwd" else ("fwd", "bwd")
    traffic = spec.dtype.itemsize * sum(elements[name] for name in passes)
    return traffic, steps * sum(work[name][0] * shape.dstate + work[name][1] for name in passes)


def _convolution(spec: Spec, work: dict[str, tuple[int, int]]) -> tuple[int, int]:
    steps = spec.shape.batch * spec.shape.dim * spec.shape.seqlen
    return spec.dtype.itemsize * steps * (2 if spec.direction == "fwd" else 5), 0


def _update(spec: Spec, work: dict[str, tuple[int, int]]) -> tuple[int, int]:
    shape = spec.shape
    states, row = shape.batch * shape.dim * shape.dstate, shape.dim * shape.dstate
    offsets = {"one-adapter": row, "64-adapters": min(shape.batch, ADAPTERS) * row}
    # the state is read and written; A is read, and so are the offsets
    floats = 2 * states + row + sum(size for tag, size in offsets.items() if tag in spec.tags)
    per_state, per_step = work["fwd"]
    channels = shape.batch * shape.dim
    return 4 * floats + 4 * spec.dtype.itemsize * channels, per_state * states + per_step * channels

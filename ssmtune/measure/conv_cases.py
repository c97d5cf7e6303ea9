"""One timed causal convolution of width 4 with silu, against torch's on the same channels-last view."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.measure.call_cases import CallCase
from ssmtune.measure.specs import OURS, Spec

WIDTH = 4


@dataclass(frozen=True)
class ConvSpec(Spec):
    """A convolution on x as a model has it: half of what a projection makes. Every other backend than ours is torch."""

    op: ClassVar[str] = "causal_conv1d"

    tags: tuple[str, ...] = ("silu",)

    @property
    def wrt(self) -> tuple[str, ...]:
        return () if self.direction == "fwd" else ("x", "weight", "bias")

    @property
    def columns(self) -> dict[str, str | int]:
        return {**super().columns, "dstate": 0}

    def case(self) -> CallCase:
        return ConvCase(self, self.dtype)

    def oracle(self) -> "ConvSpec":
        return replace(self, direction="fwdbwd", backend="torch")

    def expected(self, channels: slice | None = None) -> dict[str, Tensor]:
        # the inputs are rounded as those of the case are
        return ConvCase(self, torch.float64).values(channels)[0]


class ConvCase(CallCase):
    """A spec made ready to run, in a dtype."""

    def __init__(self, spec: ConvSpec, dtype: torch.dtype):
        batch, dim, seqlen = spec.shape.batch, spec.shape.dim, spec.shape.seqlen
        generator = torch.Generator(spec.device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=spec.device).to(spec.dtype).to(dtype)

        self.spec = spec
        self.x = random(batch, seqlen, 2 * dim)[..., :dim].transpose(1, 2)
        self.weight, self.bias = random(dim, WIDTH), random(dim)
        for name in spec.wrt:
            getattr(self, name).requires_grad_()
        inputs = {name: getattr(self, name) for name in spec.wrt}
        super().__init__(spec.label, self.convolve, inputs, random(batch, seqlen, dim).transpose(1, 2), spec.device)

    def convolve(self) -> Tensor:
        """The call that is timed."""
        if self.spec.backend in OURS:
            from ssmtune.ops import causal_conv1d

            return causal_conv1d(self.x, self.weight, self.bias, activation="silu", backend=self.spec.backend)
        dim, seqlen = self.x.shape[1:]
        out = F.conv1d(self.x, self.weight.unsqueeze(1), self.bias, padding=WIDTH - 1, groups=dim)
        return F.silu(out[..., :seqlen])

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        named, seconds = super().values()
        if channels is not None:
            named = {name: value[:, channels] for name, value in named.items() if name in ("out", "x")}
        return {name: value.cpu() for name, value in named.items()}, seconds

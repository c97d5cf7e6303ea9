"""The sizes of a scan, and inputs for it as a model makes them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FROZEN = ("u", "delta", "z", "B", "C")
"""Gradients a scan owes when its own weights are frozen, as in parameter-efficient fine-tuning."""

FULL = (*FROZEN, "A", "D", "delta_bias")
"""Gradients a scan owes when everything trains."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one selective scan."""

    batch: int
    dim: int
    seqlen: int
    dstate: int = 16

    def __str__(self) -> str:
        return f"({self.batch}, {self.dim}, {self.seqlen})"


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of one selective scan, and the gradient that comes back to its output."""

    u: Tensor  # (batch, dim, seqlen)
    delta: Tensor  # (batch, dim, seqlen), before delta_bias and softplus
    A: Tensor  # (dim, dstate)
    B: Tensor  # (batch, dstate, seqlen)
    C: Tensor  # (batch, dstate, seqlen)
    D: Tensor  # (dim,)
    z: Tensor  # (batch, dim, seqlen)
    delta_bias: Tensor  # (dim,)
    dout: Tensor  # (batch, dim, seqlen)
    initial_state: Tensor | None = None  # (dim, dstate)
    state_offset: Tensor | None = None  # (dim, dstate)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def arguments(self) -> dict[str, Tensor]:
        """What a scan is called with: everything but `dout`."""
        return {name: value for name, value in self.tensors().items() if name != "dout"}

    def channels_first(self) -> "ScanInputs":
        """The same values with seqlen as the contiguous axis."""
        return ScanInputs(**{name: value.contiguous() for name, value in self.tensors().items()})

    def to(self, *target: torch.dtype | str) -> "ScanInputs":
        """The same scan in another dtype or on another device."""
        return ScanInputs(**{name: value.to(*target) for name, value in self.tensors().items()})

    def with_sequences_in(self, dtype: torch.dtype) -> "ScanInputs":
        """The same scan with everything that has a time axis in another dtype, as in a model that computes in it."""
        return ScanInputs(
            **{
                name: value.to(dtype) if name in ("u", "delta", "B", "C", "z", "dout") else value
                for name, value in self.tensors().items()
            }
        )

    def channels(self, chosen: slice) -> "ScanInputs":
        """The scan of some channels, which depends on no other channel."""
        rows = {"A", "D", "delta_bias", "initial_state", "state_offset"}

        def cut(name: str, value: Tensor) -> Tensor:
            if name in ("B", "C"):
                return value
            return value[chosen] if name in rows else value[:, chosen]

        return ScanInputs(**{name: cut(name, value) for name, value in self.tensors().items()})

    def requiring(self, names: tuple[str, ...]) -> "ScanInputs":
        """The same scan with leaves of its own, of which `names` ask for a gradient."""
        leaves = {name: value.detach() for name, value in self.tensors().items()}
        for name in names:
            leaves[name].requires_grad_()
        return ScanInputs(**leaves)

    def with_only(self, *, initial_state: bool = False, state_offset: bool = False) -> "ScanInputs":
        """The same scan without the state inputs that are not asked for."""
        return replace(
            self,
            initial_state=self.initial_state if initial_state else None,
            state_offset=self.state_offset if state_offset else None,
        )


def make_inputs(shape: Shape, seed: int = 0, device: str = "cpu") -> ScanInputs:
    """Inputs as a Mamba mixer at initialisation makes them: channels-last, B and C and z views of their projections.

    Args:
        shape: sizes of the scan.
        seed: of the random generator; the same seed gives the same inputs in every process.
        device: where they are drawn.

    Returns:
        Float32 inputs that require no gradient.
    """
    batch, dim, seqlen, dstate = shape.batch, shape.dim, shape.seqlen, shape.dstate
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    step = torch.empty(dim, device=device).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    B, C = normal(batch, seqlen, 2 * dstate).split(dstate, dim=2)
    return ScanInputs(
        u=normal(batch, seqlen, dim).transpose(1, 2),
        delta=(0.3 * normal(batch, seqlen, dim)).transpose(1, 2),
        A=-torch.arange(1.0, dstate + 1, device=device) * (0.1 * normal(dim, dstate)).exp(),
        B=B.transpose(1, 2),
        C=C.transpose(1, 2),
        D=1 + 0.1 * normal(dim),
        z=normal(batch, seqlen, 2 * dim)[:, :, dim:].transpose(1, 2),
        delta_bias=step + torch.log(-torch.expm1(-step)),
        dout=normal(batch, seqlen, dim).transpose(1, 2),
        initial_state=normal(dim, dstate),
        state_offset=normal(dim, dstate),
    )

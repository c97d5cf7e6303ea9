"""Mamba-2's scan as the selective scan with what a head shares written out for each of its channels.

    A[h, p, n] = A[h]        delta_t[h, p] = dt_t[h]        dim = nheads * headdim

That makes the selective scan of the reference the reference of Mamba-2, and gives each backend without a kernel of its
own one that is right, in float32: a step that was added to its bias and cut off is not rounded to a half type.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.ops.reference import cast, compute_dtype
from ssmtune.ops.selective_scan_op import allocate_gradients

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class ExpandedScan:
    """The scan of Mamba-2 on the selective scan of a backend.

    Args:
        selective: the module with the implementations of that backend.
    """

    selective: ModuleType

    def chunk_states_shape(
        self, x_shape: tuple[int, ...], groups: int, dstate: int, n_sequences: int | None
    ) -> tuple[int, ...]:
        """Return the shape of the buffer in which the forward scan keeps states for the backward scan."""
        batch, seqlen, heads, headdim = x_shape
        return self.selective.chunk_states_shape(batch, heads * headdim, seqlen, dstate, groups, n_sequences)

    def forward(
        self,
        inputs: Inputs,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        out: Tensor,
        final_states: Tensor,
        chunk_states: Tensor | None,
    ) -> None:
        """Run the scan."""
        expanded = expand(inputs, step_sizes(inputs, dt_softplus, dt_min, dt_max))
        y = torch.empty_like(expanded[0])
        self.selective.selective_scan_forward(expanded, cu_seqlens, False, y, final_states.flatten(1, 2), chunk_states)
        out.copy_(by_heads(y, out.shape))

    def backward(
        self,
        dout: Tensor | None,
        dfinal_states: Tensor | None,
        inputs: Inputs,
        cu_seqlens: Tensor | None,
        chunk_states: Tensor,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        gradients: list[Tensor | None],
    ) -> None:
        """Run the scan backward."""
        x, dt, _, B, _, _, dt_bias, *_ = inputs
        steps = step_sizes(inputs, dt_softplus, dt_min, dt_max)
        expanded = expand(inputs, steps)
        dx, ddt, dA, dB, dC, dD, ddt_bias, *dstates = gradients
        wanted = [dx, ddt if ddt_bias is None else ddt_bias, dA, dB, dC, dD, None, None, *dstates]
        computed = allocate_gradients(expanded, [gradient is not None for gradient in wanted])
        self.selective.selective_scan_backward(
            None if dout is None else channels_first(dout.to(steps.dtype)),
            None if dfinal_states is None else dfinal_states.flatten(1, 2),
            *(expanded, cu_seqlens, chunk_states, False, computed),
        )
        if dx is not None:
            dx.copy_(by_heads(computed[0], x.shape))
        if computed[1] is not None:
            of_heads = by_heads(computed[1], x.shape).sum(3) * step_slopes(inputs, dt_softplus, dt_min, dt_max)
            if ddt is not None:
                ddt.copy_(of_heads)
            if ddt_bias is not None:
                ddt_bias.copy_(of_heads.sum((0, 1)))
        if dA is not None:
            dA.copy_(computed[2].unflatten(0, x.shape[2:]).sum((1, 2)))
        for gradient, result in ((dB, computed[3]), (dC, computed[4])):
            if gradient is not None:
                gradient.copy_(result.permute(0, 3, 1, 2))
        for gradient, result in ((dD, computed[5]), *zip(dstates, computed[8:], strict=True)):
            if gradient is not None:
                gradient.copy_(result.view(gradient.shape))


def channels_first(x: Tensor) -> Tensor:
    """(batch, seqlen, nheads, headdim) to (batch, dim, seqlen)."""
    return x.flatten(2).transpose(1, 2)


def by_heads(x: Tensor, shape: torch.Size) -> Tensor:
    """(batch, dim, seqlen) to (batch, seqlen, nheads, headdim)."""
    return x.transpose(1, 2).unflatten(2, shape[2:])


def raw_steps(inputs: Inputs) -> Tensor:
    x, dt, _, _, _, _, dt_bias, *_ = inputs
    dt = dt.to(compute_dtype(x))
    return dt if dt_bias is None else dt + dt_bias.to(dt.dtype)


def step_sizes(inputs: Inputs, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """The steps (batch, seqlen, nheads) as the recurrence takes them."""
    raw = raw_steps(inputs)
    return (F.softplus(raw) if dt_softplus else raw).clamp(dt_min, dt_max)


def step_slopes(inputs: Inputs, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """The derivatives of the steps; one that was cut off has none."""
    raw = raw_steps(inputs)
    steps = F.softplus(raw) if dt_softplus else raw
    inside = (steps >= dt_min) & (steps <= dt_max)
    return torch.where(inside, torch.sigmoid(raw) if dt_softplus else 1.0, 0.0)


def expand(inputs: Inputs, steps: Tensor) -> Inputs:
    """The tensors of the selective scan, in float32 or wider."""
    x, _, A, B, C, D, _, initial_states, state_offset, output_offset = cast(steps.dtype, *inputs)
    heads, headdim = x.shape[2:]
    return (
        channels_first(x),
        steps.transpose(1, 2).repeat_interleave(headdim, dim=1),
        A[:, None].expand(-1, B.shape[3]).repeat_interleave(headdim, dim=0),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        None if D is None else D.flatten(),
        None,
        None,
        *(None if state is None else state.flatten(-3, -2) for state in (initial_states, state_offset)),
        None if output_offset is None else output_offset.flatten(-2),
    )

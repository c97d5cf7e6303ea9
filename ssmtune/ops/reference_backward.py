"""The gradients of the reference operators, written out.

An operator's kernel runs below autograd, so the reference backend needs formulas of its own. With
g_t = dout_t silu(z_t) and a_t = exp(delta_t A), the adjoint of h_t is G_t = C_t g_t + a_{t+1} G_{t+1}; every gradient
is a sum over it.
"""

from collections.abc import Iterable
from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.ops.packing import sequence_bounds
from ssmtune.ops.reference import (
    ALONG_STEPS,
    cast,
    compute_dtype,
    for_channels,
    grouped,
    has_rows,
    split_sequences,
)


def silu_gradient(x: Tensor) -> Tensor:
    """Return the derivative of silu."""
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def selective_scan_reference_backward(
    dout: Tensor | None,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of all eleven tensors, summed over the batch where one row is shared."""
    if cu_seqlens is not None:
        tensors = {"dout": dout, "dlast_state": dlast_state, "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
        tensors |= {"z": z, "delta_bias": delta_bias, "initial_state": initial_state}
        tensors |= {"state_offset": state_offset, "output_offset": output_offset}
        gradients = [
            selective_scan_reference_backward(**sequence, delta_softplus=delta_softplus)
            for sequence in split_sequences(cu_seqlens, tensors)
        ]
        return tuple(
            _join(name, tensor, pieces)
            for (name, tensor), pieces in zip(list(tensors.items())[2:], zip(*gradients, strict=True), strict=True)
        )
    (dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset) = cast(
        compute_dtype(u),
        *(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset),
    )
    raw_delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(raw_delta) if delta_softplus else raw_delta
    dout = torch.zeros_like(u) if dout is None else dout
    g = dout if z is None else dout * F.silu(z)
    offset = 0 if state_offset is None else state_offset

    shape, dim = B.shape, A.shape[0]
    B, C = grouped(B), grouped(C)
    h = u.new_zeros(u.shape[0], *A.shape) + (0 if initial_state is None else initial_state)
    states = [h]
    for u_t, delta_t, B_t in zip(u.unbind(2), delta.unbind(2), B.unbind(3), strict=True):
        h = torch.exp(delta_t[:, :, None] * A) * h + (delta_t * u_t)[:, :, None] * for_channels(B_t, dim)
        states.append(h)

    carry = torch.zeros_like(h) if dlast_state is None else dlast_state
    y, dGB, ddelta, dA = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    for t in reversed(range(u.shape[2])):
        delta_t, u_t, g_t = delta[:, :, t], u[:, :, t], g[:, :, t]
        B_t, C_t = for_channels(B[..., t], dim), for_channels(C[..., t], dim)
        read = states[t + 1] + offset
        G = C_t * g_t[:, :, None] + carry
        carry = torch.exp(delta_t[:, :, None] * A) * G
        decayed = carry * states[t]
        y[:, :, t] = (read * C_t).sum(2)
        dGB[:, :, t] = (G * B_t).sum(2)
        ddelta[:, :, t] = u_t * dGB[:, :, t] + (decayed * A).sum(2)
        dA += (decayed * delta_t[:, :, None]).sum(0)
        dB[..., t] = _sum_groups(G * (delta_t * u_t)[:, :, None], B.shape[1])
        dC[..., t] = _sum_groups(read * g_t[:, :, None], C.shape[1])

    du = delta * dGB
    if D is not None:
        y += D[:, None] * u
        du += D[:, None] * g
    if output_offset is not None:
        y += output_offset[..., None]
    if delta_softplus:
        ddelta *= torch.sigmoid(raw_delta)
    dz = None if z is None else dout * y * silu_gradient(z)
    dstate_offset = state_offset_gradient(g, C)
    return (
        *(du, ddelta, dA, dB.view(shape), dC.view(shape)),
        *((g * u).sum((0, 2)), dz, ddelta.sum((0, 2))),
        carry if has_rows("initial_state", initial_state) else carry.sum(0),
        dstate_offset if has_rows("state_offset", state_offset) else dstate_offset.sum(0),
        g.sum(2) if has_rows("output_offset", output_offset) else g.sum((0, 2)),
    )


def state_offset_gradient(g: Tensor, C: Tensor) -> Tensor:
    """Return sum_t g_t C_t, (batch, dim, dstate), for C (batch, groups, dstate, seqlen)."""
    # (batch, groups, dim / groups, seqlen) @ (batch, groups, seqlen, dstate)
    return (g.unflatten(1, (C.shape[1], -1)) @ C.transpose(2, 3)).flatten(1, 2)


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).sum(2)


def _join(name: str, tensor: Tensor | None, gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    if gradients[0] is None:
        return None
    if name in ALONG_STEPS:
        return torch.cat(gradients, dim=-1)
    return torch.cat(gradients) if has_rows(name, tensor) else torch.stack(gradients).sum(0)


def causal_conv1d_reference_backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias and initial_states."""
    if cu_seqlens is not None:
        bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.shape[2])
        lengths = [stop - start for start, stop in pairwise(bounds)]
        results = [
            causal_conv1d_reference_backward(dout, dfinal_states, x, weight, bias, initial_states, None, silu)
            for dout, dfinal_states, x, initial_states in zip(
                *(_pieces(dout, lengths, 2), _pieces(dfinal_states, 1, 0)),
                *(_pieces(x, lengths, 2), _pieces(initial_states, 1, 0)),
                strict=False,
            )
        ]
        dx, dweight, dbias, dinitial_states = zip(*results, strict=True)
        return torch.cat(dx, dim=2), sum(dweight), sum(dbias), torch.cat(dinitial_states)

    seqlen, width = x.shape[2], weight.shape[1]
    dout, dfinal_states, x, weight, bias, initial_states = cast(
        compute_dtype(x), dout, dfinal_states, x, weight, bias, initial_states
    )
    dout = torch.zeros_like(x) if dout is None else dout
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], width - 1)
    padded = torch.cat([initial_states, x], dim=2)
    taps = [padded[:, :, tap : tap + seqlen] for tap in range(width)]
    if silu:
        y = sum(weight[:, tap, None] * taps[tap] for tap in range(width))
        dout = dout * silu_gradient(y if bias is None else y + bias[:, None])
    dpadded = torch.zeros_like(padded)
    if dfinal_states is not None:
        dpadded[:, :, seqlen:] += dfinal_states
    for tap in range(width):
        dpadded[:, :, tap : tap + seqlen] += weight[:, tap, None] * dout
    dweight = torch.stack([(dout * taps[tap]).sum((0, 2)) for tap in range(width)], dim=1)
    return dpadded[:, :, width - 1 :], dweight, dout.sum((0, 2)), dpadded[:, :, : width - 1]


def _pieces(tensor: Tensor | None, sizes: int | list[int], dim: int) -> Iterable[Tensor | None]:
    return repeat(None) if tensor is None else tensor.split(sizes, dim)

"""The operators in plain PyTorch: readable, on any device and in any floating dtype, differentiable by autograd.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t                     h_0 = initial_state
    y_t = C_t (h_t + state_offset) + D u_t + output_offset             [* silu(z_t)]

Every kernel is held to these functions. They compute in float32, or in float64 when the input is float64. Time is
unbound once rather than indexed step by step: autograd of an index fills a whole tensor with zeros at each step.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.ops.adapters import gather_rows
from ssmtune.ops.packing import sequence_bounds

ALONG_STEPS = ("u", "delta", "B", "C", "z", "dout")
_DIMENSIONS_WITH_ROWS = {"initial_state": 3, "state_offset": 3, "output_offset": 2, "dlast_state": 3}


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and sums for an input: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def has_rows(name: str, tensor: Tensor | None) -> bool:
    """Say whether a parameter has a row for each row of the batch, or for each packed sequence."""
    return tensor is not None and tensor.dim() == _DIMENSIONS_WITH_ROWS.get(name)


def split_sequences(cu_seqlens: Tensor, tensors: dict[str, Tensor | None]) -> list[dict[str, Tensor | None]]:
    """Cut the tensors of a packed scan, by the names of its arguments, into those of each sequence."""
    bounds = sequence_bounds("selective_scan", cu_seqlens, tensors["u"].shape[2])
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    sequences = [dict(tensors) for _ in lengths]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in ALONG_STEPS:
            pieces = tensor.split(lengths, dim=-1)
        elif has_rows(name, tensor):
            pieces = tensor.split(1)
        else:
            continue
        for sequence, piece in zip(sequences, pieces, strict=True):
            sequence[name] = piece
    return sequences


def grouped(B: Tensor) -> Tensor:
    """Return B or C as (batch, groups, dstate, seqlen)."""
    return B.unsqueeze(1) if B.dim() == 3 else B


def for_channels(B_t: Tensor, dim: int) -> Tensor:
    """Give each channel the row of its group: (batch, groups, dstate) to (batch, dim, dstate)."""
    batch, groups, dstate = B_t.shape
    return B_t[:, :, None, :].expand(batch, groups, dim // groups, dstate).reshape(batch, dim, dstate)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence step by step, packed sequences one by one.

    Args:
        As for `ssmtune.ops.selective_scan`.

    Returns:
        out (batch, dim, seqlen) in the dtype of u, and last_state (batch or n_sequences, dim, dstate).
    """
    if cu_seqlens is not None:
        tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        tensors |= {"initial_state": initial_state, "state_offset": state_offset, "output_offset": output_offset}
        results = [
            selective_scan_reference(**sequence, delta_softplus=delta_softplus)
            for sequence in split_sequences(cu_seqlens, tensors)
        ]
        outs, states = zip(*results, strict=True)
        return torch.cat(outs, dim=2), torch.cat(states)
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset = cast(
        compute_dtype(u), u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset
    )
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    B, C = grouped(B), grouped(C)
    h = u.new_zeros(u.shape[0], *A.shape)
    if initial_state is not None:
        h = h + initial_state
    y = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(3), C.unbind(3), strict=True):
        # (batch, dim, dstate)
        B_t, C_t = for_channels(B_t, A.shape[0]), for_channels(C_t, A.shape[0])
        h = torch.exp(delta_t[:, :, None] * A) * h + (delta_t * u_t)[:, :, None] * B_t
        y.append((h * C_t).sum(2))
    out = torch.stack(y, dim=2)

    if state_offset is not None:
        # (batch or 1, groups, dim / groups, dstate) @ (batch, groups, dstate, seqlen)
        out = out + (state_offset.reshape(-1, C.shape[1], A.shape[0] // C.shape[1], A.shape[1]) @ C).flatten(1, 2)
    if D is not None:
        out = out + D[:, None] * u
    if output_offset is not None:
        out = out + output_offset[..., None]
    if z is not None:
        out = out * F.silu(z)
    return out.to(dtype), h


def selective_state_update_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """Advance `state` in place by one step of the recurrence.

    Args:
        As for `ssmtune.ops.selective_state_update`.

    Returns:
        out (batch, dim) in the dtype of x.
    """
    if adapter_index is not None:
        state_offset, output_offset = (
            None if stack is None else gather_rows(stack, adapter_index) for stack in (state_offset, output_offset)
        )
    out, last_state = selective_scan_reference(
        *(tensor.unsqueeze(-1) for tensor in (x, dt)),
        A,
        *(tensor.unsqueeze(-1) for tensor in (B, C)),
        D,
        None if z is None else z.unsqueeze(2),
        dt_bias,
        dt_softplus,
        initial_state=state,
        state_offset=state_offset,
        output_offset=output_offset,
    )
    state.copy_(last_state)
    return out.squeeze(2)


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal filter, one tap at a time.

    Args:
        As for `ssmtune.ops.causal_conv1d`.

    Returns:
        out (batch, dim, seqlen) and final_states (batch or n_sequences, dim, width - 1), both in the dtype of x.
    """
    if cu_seqlens is not None:
        bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.shape[2])
        sequences = [x[:, :, start:stop] for start, stop in pairwise(bounds)]
        starts = [None] * len(sequences) if initial_states is None else initial_states.split(1)
        results = [
            causal_conv1d_reference(sequence, weight, bias, initial_states=start, activation=activation)
            for sequence, start in zip(sequences, starts, strict=True)
        ]
        out, final_states = zip(*results, strict=True)
        return torch.cat(out, dim=2), torch.cat(final_states)

    dtype, seqlen, width = x.dtype, x.shape[2], weight.shape[1]
    x, weight, bias, initial_states = cast(compute_dtype(x), x, weight, bias, initial_states)
    if initial_states is None:
        padded = F.pad(x, (width - 1, 0))
    else:
        padded = torch.cat([initial_states, x], dim=2)
    out = sum(weight[:, tap, None] * padded[:, :, tap : tap + seqlen] for tap in range(width))
    if bias is not None:
        out = out + bias[:, None]
    return (out if activation is None else F.silu(out)).to(dtype), padded[:, :, seqlen:].to(dtype)


def causal_conv1d_update_reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Advance `conv_state` in place by one step of the convolution.

    Args:
        As for `ssmtune.ops.causal_conv1d_update`.

    Returns:
        out (batch, dim) in the dtype of x.
    """
    dtype = compute_dtype(x)
    taps = torch.cat([conv_state.to(dtype), x.to(dtype).unsqueeze(2)], dim=2)
    out = (weight.to(dtype) * taps).sum(2)
    if bias is not None:
        out = out + bias.to(dtype)
    conv_state.copy_(taps[:, :, 1:])
    return (out if activation is None else F.silu(out)).to(x.dtype)

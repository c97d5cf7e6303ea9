"""State-offset and Initial State Tuning as the paper's authors released them, written anew from what that code does.

Each takes the plain scan it is built on: mamba_ssm's kernel, or any other with its arguments. Neither changes that
scan, so the offset is a second pass over the sequence, and an initial state takes one scan for each state, whose
outputs are the states at every step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[..., Tensor]


def state_offset_scan(
    scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state_offset: Tensor
) -> Tensor:
    """The plain scan, and what the offset adds to its gated output.

    Args:
        scan: called as mamba_ssm's selective_scan_fn.
        u, delta, z: (batch, dim, seqlen); delta is the step itself.
        A, state_offset: (dim, dstate).
        B, C: (batch, dstate, seqlen).
        D: (dim,).

    Returns:
        (batch, dim, seqlen).
    """
    out = scan(u, delta, A, B, C, D, z)
    # opt_einsum is not among the requirements: without it, einsum goes from left to right and holds
    # a (batch, dim, dstate, seqlen) tensor for the backward pass
    with torch.backends.opt_einsum.flags(enabled=False):
        return out + torch.einsum("bdl,bnl,dn->bdl", F.silu(z), C, state_offset)


def initial_state_scan(
    scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, initial_state: Tensor
) -> Tensor:
    """One scan for each state, of a sequence that a token with delta = 1 and B = 1 is put before: its u is the state.

    Args:
        scan: called as mamba_ssm's selective_scan_fn.
        u, delta, z: (batch, dim, seqlen); delta is the step itself.
        A, initial_state: (dim, dstate).
        B, C: (batch, dstate, seqlen).
        D: (dim,).

    Returns:
        (batch, dim, seqlen).
    """
    batch, dim, seqlen = u.shape
    one = delta.new_ones(batch, dim, 1)
    delta = torch.cat([one, delta], dim=2)
    states = []
    for n in range(A.shape[1]):
        first = initial_state[:, n, None].to(u.dtype).expand(batch, dim, 1)
        B_n = torch.cat([B.new_ones(batch, 1, 1), B[:, n : n + 1]], dim=2)
        h_n = scan(torch.cat([first, u], dim=2), delta, A[:, n : n + 1].contiguous(), B_n, torch.ones_like(B_n))
        states.append(h_n[:, :, 1:])
    h = torch.stack(states, dim=1)  # (batch, dstate, dim, seqlen)
    y = torch.einsum("bndl,bnl->bdl", h, C) + D.to(u.dtype)[:, None] * u
    return y * F.silu(z)


SCANS = {"state-offset": state_offset_scan, "initial-state": initial_state_scan}

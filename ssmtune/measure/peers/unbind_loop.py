"""The recurrence as a PyTorch loop over time whose backward pass is linear in seqlen."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """One step of the recurrence per turn, on time-first tensors split once by `unbind`.

    Indexing `decay[:, :, t]` instead would make autograd fill a whole (batch, dim, seqlen, dstate) gradient at every
    step, which is quadratic in seqlen.
    """
    u, delta, B, C, z = (tensor.permute(2, 0, 1) for tensor in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (seqlen, batch, dim, dstate)
    entry = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    state = torch.zeros_like(entry[0])
    states = []
    for decay_t, entry_t in zip(decay.unbind(0), entry.unbind(0), strict=True):
        state = decay_t * state + entry_t
        states.append(state)
    y = (torch.stack(states) @ C.unsqueeze(-1)).squeeze(-1) + D * u
    return (y * F.silu(z)).permute(1, 2, 0)

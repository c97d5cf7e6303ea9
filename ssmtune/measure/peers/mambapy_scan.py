"""mamba.py: a parallel (Blelloch) scan in PyTorch, the usual way to train Mamba without a GPU kernel."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not() -> str | None:
    """None where mambapy is installed, else the reason."""
    return None if find_spec("mambapy") else "mambapy is not installed (pip install mambapy)"


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """The scan as mambapy's own Mamba block writes it, around `mambapy.pscan.pscan`."""
    from mambapy.pscan import pscan

    u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (batch, seqlen, dim, dstate)
    entry = (delta.unsqueeze(-1) * B.unsqueeze(2)) * u.unsqueeze(-1)
    states = pscan(decay, entry)
    y = (states @ C.unsqueeze(-1)).squeeze(3) + D * u
    return (y * F.silu(z)).transpose(1, 2)

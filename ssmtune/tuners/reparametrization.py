"""Training a tensor through a small network, as prefix tuning does."""

from __future__ import annotations

import math

import torch
from torch import nn


class Reparametrization(nn.Module):
    """An MLP that gives a tensor (dim,) or (dim, columns), zero at first.

        tensor[:, n] = outer(tanh(inner(embedding[n])))        outer and inner are linear layers

    Args:
        shape: of the tensor.
        hidden: the number of hidden units.
        device: where its parameters are.

    Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int, device: torch.device):
        super().__init__()
        dim, *columns = shape
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(math.prod(columns), dim, device=device))
        self.inner = nn.Linear(dim, hidden, device=device, dtype=torch.float32)
        self.outer = nn.Linear(hidden, dim, device=device, dtype=torch.float32)
        self.restart()

    def restart(self) -> None:
        """Give zeros again."""
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> torch.Tensor:
        # A result rounded to bfloat16 would be the tensor itself rounded.
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.outer(torch.tanh(self.inner(self.embedding))).T.reshape(self.shape)

"""Training without gradients: two forward passes in opposite random directions say how far to go along one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD in place, in the memory of inference.

        g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)        z standard normal, drawn again from its seed
        theta <- theta - lr (g z + weight_decay theta)

    `estimate` adds up g over the batches of a step, all along the same z, and `step` uses it. z depends on the seed,
    the number of steps made and the order of the parameters alone: from `state_dict` training goes on to the bit.

    Args:
        params: float32 parameters or groups of them; steps of eps would be lost in narrower ones.
        lr: the learning rate.
        eps: how far to look.
        weight_decay: as above.
        seed: of the directions.

    Raises:
        ValueError: a parameter is not float32.

    Source: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, 2023, algorithm 1.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-3, weight_decay: float = 0.0, seed: int = 0):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed, "steps": 0})
        narrow = {p.dtype for group in self.param_groups for p in group["params"]} - {torch.float32, torch.float64}
        if narrow:
            raise ValueError(
                f"MeZO cannot train weights of type {', '.join(map(str, narrow))}: steps of {eps} are lost in them.\n"
                "  Load the model in float32, or train an adapter, whose tensors are float32."
            )
        self.projected = 0.0

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor], average: Callable[[Tensor], Tensor] = lambda value: value) -> Tensor:
        """Look in both directions.

        Args:
            loss: computes the loss at the parameters as they are.
            average: of a number over all processes that train together.

        Returns:
            The mean of both losses.
        """
        eps = self.param_groups[0]["eps"]
        self._move(eps)
        ahead = loss()
        self._move(-2 * eps)
        behind = loss()
        self._move(eps)
        self.projected += average((ahead.double() - behind.double()) / (2 * eps)).item()
        return (ahead + behind) / 2

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self._move(*(-group["lr"] * self.projected for group in self.param_groups))
        self.projected = 0.0
        for group in self.param_groups:
            group["steps"] += 1

    def _move(self, *scales: float) -> None:
        """Add z times a scale, the same for all groups or one for each."""
        scales = scales * len(self.param_groups) if len(scales) == 1 else scales
        first = self.param_groups[0]
        generators: dict[torch.device, torch.Generator] = {}
        for group, scale in zip(self.param_groups, scales, strict=True):
            for parameter in group["params"]:
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(_mixed(first["seed"], first["steps"]))
                z = torch.randn(parameter.shape, generator=generators[device], device=device, dtype=parameter.dtype)
                parameter.add_(z, alpha=scale)


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits, all that a generator of the CPU looks at."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

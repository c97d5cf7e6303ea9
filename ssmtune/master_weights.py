"""AdamW for weights of a half type, which are trained in place where a method has no tensors of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps a float32 copy of every narrower parameter, updates that, and rounds it into the parameter.

        master <- AdamW(master, float32(gradient))          parameter <- round(master)

    Beside 1 an update of 2e-3 rounds to nothing in bfloat16: without the copy most parameters would never change. The
    copies are part of `state_dict`, so that training goes on from where it was to the bit.

    Args:
        params: parameters or groups of them, of any floating-point types.
        options: of `torch.optim.AdamW`.

    Source: Micikevicius et al., Mixed Precision Training, 2018.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._masters = {p: p.detach().float() for p in parameters if p.dtype != torch.float32}

    @torch.no_grad()
    def step(self, closure=None):
        with self._widened():
            loss = super().step(closure)
        for parameter, master in self._masters.items():
            parameter.copy_(master)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masters": list(self._masters.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self._widened():
            # It gives the moments the type of their parameters.
            super().load_state_dict(state_dict)
        for master, stored in zip(self._masters.values(), state_dict["masters"], strict=True):
            master.copy_(stored)

    @contextmanager
    def _widened(self) -> Iterator[None]:
        """Let the parameters be their float32 copies."""
        narrow = [(parameter, parameter.data, parameter.grad) for parameter in self._masters]
        for parameter, _, gradient in narrow:
            parameter.grad = None
            parameter.data = self._masters[parameter]
            parameter.grad = None if gradient is None else gradient.float()
        try:
            yield
        finally:
            for parameter, data, gradient in narrow:
                parameter.grad = None
                parameter.data = data
                parameter.grad = gradient

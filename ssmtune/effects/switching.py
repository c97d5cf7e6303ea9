"""How long it takes a model to change from one adapter to another, both in memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ssmtune.effects.context import Context

ROUNDS = 5
SECOND = "another"


def measure(model: nn.Module, context: Context) -> dict[str, Any] | None:
    """Median time of one switch, through peft's `set_adapter` where a second adapter fits into the model.

    Where none does, as with tensors trained in place and with two adapters at once, the trained tensors of one are
    copied over those of the other. None for a model that nothing was trained in.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model is context.base or not trained:
        return None
    adapters = list(getattr(model, "peft_config", {}))
    if len(adapters) == 1 and _added(model, adapters[0]):
        return {"ms": _milliseconds(model, model.set_adapter, (SECOND, adapters[0])), "how": "set_adapter"}
    first, second = ([parameter.detach().clone() for parameter in trained] for _ in range(2))

    @torch.no_grad()
    def put(tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(trained, tensors, strict=True):
            parameter.copy_(tensor)

    return {"ms": _milliseconds(model, put, (second, first)), "how": "copied"}


def _added(model, adapter: str) -> bool:
    """Add a second adapter like the first, if the model takes one."""
    try:
        model.add_adapter(SECOND, copy.deepcopy(model.peft_config[adapter]))
    except (ValueError, NotImplementedError):
        return False
    return True


def _milliseconds(model: nn.Module, switch: Callable[[Any], None], between: tuple[Any, Any]) -> float:
    on_gpu = next(model.parameters()).is_cuda
    times = []
    # the first round loads what has to be loaded
    for target in between * (ROUNDS + 1):
        began = time.perf_counter()
        switch(target)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmtune.tuners.sparse_dimension.layer import SparseDimensionLayer


def choose_dimensions(model: nn.Module, train: Callable[[int], object]) -> None:
    """Choose the channels and states that the new adapters of sparse dimension tuning train.

    All of them are trained for a few steps. Then each mixer keeps the channels whose A has changed most, and of each
    its states likewise; they start again from the base:

        importance[d, n] = a[d, n]^2          of a channel: the sum over its states

    Nothing happens to a model without such adapters, or with loaded ones, whose dimensions have been chosen.

    Args:
        model: the model; other adapters of it take part in the training and are put back.
        train: trains the model for so many steps.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SparseDimensionLayer) and layer.pending]
    if not layers:
        return
    pending = [(layer, name, config) for layer in layers for name, config in layer.pending.items()]
    for layer, name, _ in pending:
        every = torch.arange(layer.dim, device=layer.tensors("A")[name].device)
        layer.train_dimensions(name, every, every[: layer.dstate].repeat(layer.dim, 1))
        layer.pending = {}
    dense = {id(parameter) for layer, _, _ in pending for parameter in layer.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in dense]
    before = [parameter.detach().clone() for parameter in others]
    train(max(config.warm_up_steps for _, _, config in pending))
    with torch.no_grad():
        for parameter, value in zip(others, before, strict=True):
            parameter.copy_(value)
    for layer, name, config in pending:
        importance = layer.tensors("A")[name].detach().square()
        layer.train_dimensions(name, *most_important(importance, *layer.sizes(config)))


def most_important(importance: Tensor, channels: int, states: int) -> tuple[Tensor, Tensor]:
    """The channels (channels,) of the largest sums, and in each the states (channels, states) of the largest values.

    Args:
        importance: (dim, dstate).
        channels, states: how many of them.
    """
    chosen = importance.sum(1).topk(channels).indices.sort().values
    return chosen, importance[chosen].topk(states).indices.sort(1).values

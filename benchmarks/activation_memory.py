"""What a mixer keeps of its forward pass for its backward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd saves during a forward pass, each piece of memory once and no parameters."""
    kept: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        result = run()
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

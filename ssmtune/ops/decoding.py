"""What the decoding steps share: the short way into the compiled kernel, and the checks of their state.

A model decodes one token with a call for each layer, so what Python does around the kernel counts. A call that leaves
nothing to choose or to differentiate skips it: the kernel checks every shape, dtype and device before it writes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssmtune.ops import backends


def call_directly(op: str, x: object, wish: str | None, args: tuple) -> Tensor | None:
    """Call the compiled kernel of `op` on `args`, if the backend chosen for `x` is that one.

    None says that it did not run, and that nothing was written. Whoever gets it takes the long way, which casts what
    the kernel does not take and says in words what is wrong.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    if x.dtype not in backends.KERNEL_DTYPES or backends.choose(op, x.device, x.dtype, wish) not in ("cpu", "cuda"):
        return None
    try:
        return getattr(torch.ops.ssmtune_native, op)(*args)
    except (RuntimeError, TypeError):
        return None


def check_overwritten(op: str, name: str, tensors: Mapping[str, Tensor | None], instead: str) -> None:
    """Check that the state called `name` can be overwritten in place; `instead` is what to call for gradients."""
    state = tensors[name]
    if any(size > 1 and stride == 0 for size, stride in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(
            f"{op}: {name} of shape {tuple(state.shape)} is expanded, with strides {state.stride()}.\n"
            f"  It is overwritten in place, and its rows share memory. Make a copy of it first: {name}.clone()."
        )
    if torch.is_grad_enabled():
        for argument, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {argument} requires a gradient, but the update has none: it overwrites {name} in place.\n"
                    f"  Decode under torch.no_grad(). To train through a step call {instead}."
                )

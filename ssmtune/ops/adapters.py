"""Offsets of several adapters in one batch: stacks of them, and which entry each row reads.

`adapter_index` (batch,) holds places in the stacks. -1 stands for no adapter: such a row has no offset.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssmtune.ops import arguments


def check_adapters(
    op: str,
    main: str,
    adapter_index: Tensor,
    tensors: Mapping[str, Tensor | None],
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
) -> None:
    """Check `adapter_index` and the stacks it goes with, but for its values; `axes` are those of an output offset.

    Kernels read the stacks where they lie: a copy made to suit them would be one of every adapter, at every token.
    """
    x = tensors["x"]
    arguments.check_integers(op, main, "adapter_index", adapter_index, x.device, "Its values are places in a stack.")
    arguments.check_shape(op, "adapter_index", adapter_index, (("batch",),), sizes, f"Each row of {main} has one.")
    layouts = {"state_offset": ("n_adapters", *axes, "dstate"), "output_offset": ("n_adapters", *axes)}
    stacks = {name: tensors[name] for name in layouts if tensors[name] is not None}
    if not stacks:
        raise ValueError(
            f"{op}: adapter_index was given without state_offset and output_offset.\n"
            "  It says which of the stacked offsets each row reads. Pass a stack of them, or no adapter_index."
        )
    counts = [stack.shape[0] for name, stack in stacks.items() if stack.dim() == len(layouts[name])]
    sizes = {**sizes, "n_adapters": max([1, *counts])}
    for name, stack in stacks.items():
        why = "With adapter_index offsets are stacks, of one entry per adapter."
        arguments.check_shape(op, name, stack, (layouts[name],), sizes, why)
        if stack.dtype != torch.float32 and (stack.dtype, x.dtype) != (torch.float64, torch.float64):
            raise TypeError(
                f"{op}: {name} has dtype {stack.dtype}, expected float32 together with adapter_index.\n"
                f"  Casting a stack would copy every adapter at each call. Make it float32 once: {name}.float()."
            )
        if not stack[0].is_contiguous():
            raise ValueError(
                f"{op}: the entries of {name} have strides {stack.stride()[1:]}, expected contiguous ones.\n"
                f"  A stack is read where it lies, without a copy. Make one once: {name}.contiguous()."
            )


def check_values(op: str, adapter_index: Tensor, state_offset: Tensor | None, output_offset: Tensor | None) -> None:
    """Check the values of `adapter_index`; on a GPU this would wait for it, and they are left alone.

    Raises:
        ValueError: one is less than -1, or no place in the stacks.
    """
    if adapter_index.device.type != "cpu":
        return
    n_adapters = (output_offset if state_offset is None else state_offset).shape[0]
    for row, value in enumerate(adapter_index.tolist()):
        if not -1 <= value < n_adapters:
            raise ValueError(
                f"{op}: adapter_index has {value} for row {row}, expected -1 to {n_adapters - 1}.\n"
                f"  The offsets are stacks of {n_adapters}, and -1 stands for none. Pass the place of its adapter."
            )


def gather_rows(stack: Tensor, adapter_index: Tensor) -> Tensor:
    """Gather from a stack what each row of a batch has, for the scans and the convolution; it is differentiable.

        rows[b] = stack[adapter_index[b]], or 0 where that is no place in the stack

    Args:
        stack: (n_adapters, ...). Initial states or offsets.
        adapter_index: (batch,), integers; -1 stands for no adapter.

    Returns:
        (batch, ...) in the dtype of the stack; on a CPU the stack itself if row b has its entry b, for every row.
    """
    # Where it is free to look: without a copy if each row has the entry of its own place, in one pass if each has any.
    free = adapter_index.device.type == "cpu" and not torch.compiler.is_compiling()
    if free and adapter_index.tolist() == list(range(stack.shape[0])):
        return stack
    known = (adapter_index >= 0) & (adapter_index < stack.shape[0])
    rows = stack[adapter_index.clamp(0, stack.shape[0] - 1).long()]
    if free and bool(known.all()):
        return rows
    return rows.masked_fill(~known.view(-1, *[1] * (stack.dim() - 1)), 0)

"""Checks of the operators' arguments: every wrong call is refused here, in words, before a kernel sees it."""

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(op: str, main: str, tensors: Mapping[str, Tensor | None], optional: frozenset[str]) -> None:
    """Check that arguments are real floating-point tensors on the device of the main one."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            allowed = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(
                f"{op}: {name} is of type {type(tensor).__name__}, expected {allowed}.\n"
                f"  The operator works on torch tensors only. Convert it, for example with torch.as_tensor({name})."
            )
        if tensor.dtype not in FLOATING_DTYPES:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64.\n"
                f"  {_why_not_dtype(tensor)} Cast it, for example with {name}.float()."
            )
        check_layout(op, name, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but {main} is on {device}.\n"
                f"  All tensors of one call must be on one device. Move it with {name}.to({main}.device)."
            )


def _why_not_dtype(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "Complex state spaces are not supported."
    return "The recurrence is one of real numbers."


def check_layout(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is an ordinary one, not a sparse one."""
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} has layout {tensor.layout}, expected torch.strided.\n"
            f"  Sparse and compressed tensors are not supported. Convert it with {name}.to_dense()."
        )


def check_integers(op: str, main: str, name: str, tensor: Tensor, device: torch.device, why: str) -> None:
    """Check that an argument is a tensor of int32 or int64 on the device of the main one; `why` says what it holds."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{op}: {name} is of type {type(tensor).__name__}, expected a tensor or None.\n"
            f"  The operator works on torch tensors only. Convert it with torch.tensor({name}, dtype=torch.int32)."
        )
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected int32 or int64.\n"
            f"  {why} Cast it, for example with {name}.int()."
        )
    check_layout(op, name, tensor)
    if tensor.device != device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, but {main} is on {device}.\n"
            f"  All tensors of one call must be on one device. Move it with {name}.to({main}.device)."
        )


def check_dimensions(op: str, name: str, tensor: Tensor, axes: tuple[str, ...]) -> None:
    """Check the number of dimensions of the tensor the sizes are read from, and that none is empty."""
    if tensor.dim() != len(axes):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {len(axes)} dimensions, ({', '.join(axes)}).\n"
            f"  The other sizes are read from {name}. Add or remove a dimension with unsqueeze or squeeze."
        )
    for axis, size in zip(axes, tensor.shape, strict=True):
        if size == 0:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, so {axis} is 0; expected at least 1.\n"
                f"  There is nothing to compute in an empty sequence or batch. Skip the call when {axis} is 0."
            )


def check_shape(
    op: str, name: str, tensor: Tensor | None, layouts: tuple[tuple[str, ...], ...], sizes: Mapping[str, int], why: str
) -> None:
    """Check that a tensor has one of the layouts, given as names of axes; `why` says where the sizes come from."""
    if tensor is None:
        return
    for axes in layouts:
        if tensor.shape == tuple([sizes[axis] for axis in axes]):
            return
    expected = " or ".join(
        f"({', '.join(axes)}{',' if len(axes) == 1 else ''}) = {tuple([sizes[axis] for axis in axes])}"
        for axes in layouts
    )
    raise ValueError(
        f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}.\n"
        f"  {why} {_what_to_do(op, name, tensor, layouts, sizes)}"
    )


def check_groups(
    op: str,
    B: Tensor,
    C: Tensor,
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
    why: str,
    divided: str = "dim",
) -> None:
    """Check that B and C have these axes, as in (batch, dstate), or both have groups too, (batch, groups, dstate).

    The groups have to divide the axis called `divided`.
    """
    without = len(axes)
    if B.dim() == without + 1:
        sizes, axes, why = (
            {**sizes, "groups": B.shape[1]},
            ("batch", "groups", *axes[1:]),
            f"{why} C has the groups of B.",
        )
        size = sizes[divided]
        if B.shape[1] == 0 or size % B.shape[1] != 0:
            raise ValueError(
                f"{op}: B has shape {tuple(B.shape)}, so groups is {B.shape[1]}, expected a divisor of "
                f"{divided} = {size}.\n"
                "  Each group is read by as many channels as the next. Take as many groups as the model has."
            )
    if {B.dim(), C.dim()} == {without, without + 1}:
        raise ValueError(
            f"{op}: C has shape {tuple(C.shape)} and B {tuple(B.shape)}, expected both with groups or both without.\n"
            "  A channel reads the same group of both. Give the other one its groups, or a single one by unsqueeze(1)."
        )
    check_shape(op, "B", B, (axes,), sizes, why)
    check_shape(op, "C", C, (axes,), sizes, why)


def _what_to_do(
    op: str, name: str, tensor: Tensor, layouts: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]
) -> str:
    shape = tuple(tensor.shape)
    if any(sorted(shape) == sorted(sizes[axis] for axis in axes) for axes in layouts):
        return f"The sizes are right in another order: transpose {name}."
    if name in ("initial_state", "state_offset", "output_offset"):
        return "A trained state fits only models with the sizes it was trained for."
    return f"Pass {name} with that shape."

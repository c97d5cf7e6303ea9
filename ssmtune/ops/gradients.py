"""What the operators share of their backward passes: which gradients take a scan, what is refused, what is returned.

A backward operator returns a list without gaps, since operators return no lists of optional tensors.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# the gradient of each of these is a sum over that of the output, which takes no scan
WITHOUT_SCAN = ("D", "state_offset", "output_offset")


def takes_scan(
    names: Sequence[str],
    has_rows: Callable[[str, Tensor], bool],
    inputs: Iterable[Tensor | None],
    wanted: Iterable[bool],
    cu_seqlens: Tensor | None,
) -> bool:
    """Say whether one of the wanted gradients takes a backward scan; `has_rows` is asked of an input by its name."""
    for name, tensor, is_wanted in zip(names, inputs, wanted, strict=True):
        # one sum for each packed sequence is no longer a single matrix product
        if is_wanted and (name not in WITHOUT_SCAN or (cu_seqlens is not None and has_rows(name, tensor))):
            return True
    return False


def check_states_are_kept(op: str, keep_states: bool) -> None:
    """Refuse a forward scan that a backward scan is to follow and that keeps no states for it."""
    if not keep_states:
        raise RuntimeError(
            f"ssmtune::{op}_fwd was called with keep_states=False on tensors that need a gradient.\n"
            f"  The backward scan starts from the states the forward scan keeps. Call ssmtune.{op}."
        )


def refuse_second_derivatives(op: str, remedy: str) -> None:
    """Have the backward operator say that it cannot be differentiated, and what to do instead."""

    def refuse(ctx, *gradients):
        raise RuntimeError(f"{op} has no second derivatives: its backward pass is a kernel, not a graph.\n  {remedy}")

    torch.library.register_autograd(f"ssmtune::{op}_bwd", refuse)


def wanted_gradients(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Leave out the gradients that nobody asked for, and give the others the dtypes of their inputs."""
    return [
        gradient.to(tensor.dtype) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None
    ]


def one_for_each(computed: Iterable[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Put None back in the place of the gradients that nobody asked for."""
    remaining = iter(computed)
    return [next(remaining) if is_wanted else None for is_wanted in wanted]

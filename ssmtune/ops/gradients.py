"""What a backward operator returns: a list without gaps, since operators return no lists of optional tensors."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def wanted_gradients(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Leave out the gradients that nobody asked for, and give the others the dtypes of their inputs."""
    return [
        gradient.to(tensor.dtype) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None
    ]


def one_for_each(computed: Iterable[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Put None back in the place of the gradients that nobody asked for."""
    remaining = iter(computed)
    return [next(remaining) if is_wanted else None for is_wanted in wanted]

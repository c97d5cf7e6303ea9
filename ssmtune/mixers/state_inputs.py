"""What adapters add to a mixer's recurrence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class StateInputs:
    """Tensors an adapter hands to the convolution and the scan of its mixer; None adds nothing.

    Args:
        initial_state: (dim, dstate) or (batch, dim, dstate). The state before the first token; a cached one
            replaces it.
        state_offset: (dim, dstate) or (batch, dim, dstate). Added to the state where it is read, never carried on.
        output_offset: (dim,) or (batch, dim). Added to the output of the scan, before the gate.
        conv_state: (dim, width - 1) or (batch, dim, width - 1). What the convolution sees left of the first token,
            oldest first; cached inputs replace it.
    """

    initial_state: Tensor | None = None
    state_offset: Tensor | None = None
    output_offset: Tensor | None = None
    conv_state: Tensor | None = None

    def __add__(self, other: StateInputs) -> StateInputs:
        return StateInputs(
            initial_state=_sum(self.initial_state, other.initial_state),
            state_offset=_sum(self.state_offset, other.state_offset),
            output_offset=_sum(self.output_offset, other.output_offset),
            conv_state=_sum(self.conv_state, other.conv_state),
        )


class StateAdapter(nn.Module, ABC):
    """Base of the adapters a patched mixer listens to: register one as a child module of the mixer, under any name."""

    @abstractmethod
    def state_inputs(self) -> StateInputs:
        """What the adapter adds now; an adapter that is switched off returns an empty `StateInputs`."""


def sum_state_inputs(mixer: nn.Module) -> StateInputs:
    """The sum of what the adapters among the children of a mixer add."""
    total = StateInputs()
    for child in mixer.children():
        if isinstance(child, StateAdapter):
            total = total + child.state_inputs()
    return total


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # The batch is the leading axis, so that one shared by the batch broadcasts.
    return a + b

"""What adapters add to a mixer's recurrence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from torch import Tensor, nn

from ssmtune.ops.adapters import gather_rows


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
        adapter_index: (batch,), integers. Each of the others is then a stack (n_adapters, ...), of which row b of a
            batch has the entry adapter_index[b]; -1 adds nothing.
    """

    initial_state: Tensor | None = None
    state_offset: Tensor | None = None
    output_offset: Tensor | None = None
    conv_state: Tensor | None = None
    adapter_index: Tensor | None = None

    def __add__(self, other: StateInputs) -> StateInputs:
        return StateInputs(*map(_sum, self.of_rows()._tensors(), other.of_rows()._tensors()))

    def at_every_token(self) -> StateInputs:
        """The same without what is there before the first token alone."""
        if self.state_offset is None and self.output_offset is None:
            return StateInputs()
        return replace(self, initial_state=None, conv_state=None)

    def of_rows(self) -> StateInputs:
        """The same without `adapter_index`: what each row of the batch has, gathered from the stacks."""
        if self.adapter_index is None:
            return self
        stacks = self._tensors()
        return StateInputs(*(None if stack is None else gather_rows(stack, self.adapter_index) for stack in stacks))

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.initial_state, self.state_offset, self.output_offset, self.conv_state


class StateAdapter(nn.Module, ABC):
    """Base of the adapters a patched mixer listens to: register one as a child module of the mixer, under any name."""

    @abstractmethod
    def state_inputs(self) -> StateInputs:
        """What the adapter adds now; an adapter that is switched off returns an empty `StateInputs`."""


def sum_state_inputs(mixer: nn.Module) -> StateInputs:
    """The sum of what the adapters among the children of a mixer add."""
    inputs = [child.state_inputs() for child in mixer.children() if isinstance(child, StateAdapter)]
    return reduce(add, inputs) if inputs else StateInputs()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # The batch is the leading axis, so that one shared by the batch broadcasts.
    return a + b

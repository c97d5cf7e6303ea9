"""What adapters add to a mixer's recurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
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
        conv_state: (channels, width - 1) or (batch, channels, width - 1), of all channels that are convolved. What the
            convolution sees left of the first token, oldest first; cached inputs replace it.
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

    def of_sequences(self, cu_seqlens: Tensor, seqlen: int) -> StateInputs:
        """The same for sequences packed into rows of so many tokens, each with the adapter of its row."""
        if self.adapter_index is None:
            return self
        return replace(self, adapter_index=self.adapter_index[cu_seqlens[:-1] // seqlen])

    def of_states(self, dstate: int) -> StateInputs:
        """The same for so many states, of which it leaves the last as they are."""

        def widen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else F.pad(tensor, (0, dstate - tensor.shape[-1]))

        return replace(self, initial_state=widen(self.initial_state), state_offset=widen(self.state_offset))

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.initial_state, self.state_offset, self.output_offset, self.conv_state


@dataclass(frozen=True)
class ExtraStates:
    """States of an adapter's own, which run in the same scan as those of the mixer.

    Args:
        A: (dim, k), negative.
        B: (batch, seqlen, k).
        C: (batch, seqlen, k).
    """

    A: Tensor
    B: Tensor
    C: Tensor


class StateAdapter(nn.Module):
    """Base of the adapters a patched mixer listens to: register one as a child module of the mixer, under any name.

    An adapter that is switched off gives what these methods give here.
    """

    def state_inputs(self) -> StateInputs:
        """What the adapter adds to the states and to the output."""
        return StateInputs()

    def change_matrix(self, A: Tensor) -> Tensor:
        """A (dim, dstate), as the adapter has it."""
        return A

    def change_projections(self, u: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """What `x_proj` makes of u (batch, seqlen, dim), B and C (batch, seqlen, dstate), as the adapter has it."""
        return B, C

    def extra_states(self, u: Tensor) -> ExtraStates | None:
        """States beside those of the mixer, given the input u (batch, seqlen, dim) of the scan."""
        return None


def adapters_of(mixer: nn.Module) -> list[StateAdapter]:
    """The adapters among the children of a mixer."""
    return [child for child in mixer.children() if isinstance(child, StateAdapter)]


def sum_state_inputs(mixer: nn.Module, cu_seqlens: Tensor | None = None, seqlen: int = 0) -> StateInputs:
    """The sum of what the adapters among the children of a mixer add, to rows or to what is packed into rows."""
    inputs = [adapter.state_inputs() for adapter in adapters_of(mixer)]
    if cu_seqlens is not None:
        inputs = [each.of_sequences(cu_seqlens, seqlen) for each in inputs]
    return reduce(add, inputs) if inputs else StateInputs()


def with_extra_states(
    mixer: nn.Module, u: Tensor, A: Tensor, B: Tensor, C: Tensor, inputs: StateInputs
) -> tuple[Tensor, Tensor, Tensor, StateInputs]:
    """A, B, C and the inputs of a scan with the states that the adapters of a mixer have beside those of the mixer.

    Args:
        u: (batch, seqlen, dim).
        A: (dim, dstate).
        B, C: (batch, seqlen, dstate) or (batch, seqlen, groups, dstate); every group gets the same extra states.
        inputs: what is added to the states of the mixer alone.
    """
    extras = [adapter.extra_states(u) for adapter in adapters_of(mixer)]
    extras = [extra for extra in extras if extra is not None]
    for extra in extras:
        A = torch.cat([A, extra.A], dim=-1)
        B, C = _beside(B, extra.B), _beside(C, extra.C)
    return A, B, C, inputs.of_states(A.shape[-1]) if extras else inputs


def _beside(projected: Tensor, extra: Tensor) -> Tensor:
    if projected.dim() > extra.dim():
        extra = extra.unsqueeze(2).expand(-1, -1, projected.shape[2], -1)
    return torch.cat([projected, extra.to(projected.dtype)], dim=-1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # The batch is the leading axis, so that one shared by the batch broadcasts.
    return a + b

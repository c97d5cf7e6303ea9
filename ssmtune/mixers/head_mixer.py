"""The forward pass of mixers of heads, whose inputs all go through one convolution in front of the recurrence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import read_states
from .recomputation import Recomputation
from .selective_mixer import SelectiveMixer
from .state_inputs import StateInputs, sum_state_inputs


class HeadMixer(SelectiveMixer):
    """A mixer of heads, channels-last from the first projection to the last.

    Its adapters see the channels of all heads as one axis, dim. A class for a kind of recurrence says what is
    projected, how the heads run, and how their output leaves the mixer.
    """

    def mix(self, hidden_states: Tensor, cache: Any | None, attention_mask: Tensor | None) -> Tensor:
        """Run the mixer as `SelectiveMixer.mix` does; the offsets enter before the gated norm."""
        rows = hidden_states.shape[:2]
        hidden_states, pads, cu_seqlens = self.read_mask(hidden_states, cache, attention_mask)
        inputs = sum_state_inputs(self, cu_seqlens, rows[1])
        context, state = read_states(cache, self.layer_idx, self.conv_kernel_size)
        step = hidden_states.shape[1] == 1 and state is not None and not torch.is_grad_enabled()
        inputs = inputs.at_every_token() if step else inputs.of_rows()

        gate, x, steps = self.project(hidden_states)
        with Recomputation(self.recompute != "nothing") as made:
            u = self.convolve_tokens(made, x, context, inputs, cache, pads, cu_seqlens, step)
            if step:
                y = self.advance_heads(made, u, steps, pads, state, inputs, gate)
            else:
                y, last_state = self.scan_heads(made, u, steps, pads, state, inputs, cu_seqlens, gate)
        if cache is not None and not step:
            cache.update_recurrent_state(last_state, self.layer_idx)
        out = self.read_out(y, gate)
        return out if cu_seqlens is None else out.view(*rows, -1)

    def states_after(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        _, x, steps = self.project(hidden_states)
        x = x.transpose(1, 2)
        with Recomputation(self.recompute != "nothing") as made:
            _, state = self.scan_heads(made, self.convolve(made, x, None, None), steps)
        width = self.conv_kernel_size - 1
        return self.as_cached(state).flatten(1, 2), F.pad(x, (width, 0))[..., x.shape[-1] :]

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The gate, the input (batch, seqlen, conv_dim) of the convolution, and what else the heads need of a step."""
        raise NotImplementedError

    def scan_heads(
        self,
        made: Recomputation,
        u: Tensor,
        steps: Any,
        pads: Tensor | None = None,
        state: Tensor | None = None,
        inputs: StateInputs | None = None,
        cu_seqlens: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence on what the convolution gave.

        Args:
            made: what is made again in the backward pass.
            u: (batch, conv_dim, seqlen).
            steps: what `project` gave besides.
            pads: (batch, seqlen, 1), or None.
            state: what a cache holds, (batch, num_heads, ...).
            inputs: what adapters add.
            cu_seqlens: (n_sequences + 1,).
            gate: what `project` gave, for mixers that gate within the recurrence.

        Returns:
            (batch, seqlen, num_heads, channels), and the last state as a cache holds it.
        """
        raise NotImplementedError

    def advance_heads(
        self,
        made: Recomputation,
        u: Tensor,
        steps: Any,
        pads: Tensor | None,
        state: Tensor,
        inputs: StateInputs,
        gate: Tensor,
    ) -> Tensor:
        """`scan_heads` for one token, which overwrites the state; inputs may have an `adapter_index`."""
        y, last_state = self.scan_heads(made, u, steps, pads, state, inputs.of_rows(), None, gate)
        state.copy_(last_state)
        return y

    def by_heads(self, inputs: StateInputs) -> StateInputs:
        """The same with the channels of outputs by heads, and states as a cache holds them."""
        heads = self.state_axes(self)[:2]
        states, offsets, outputs = inputs.initial_state, inputs.state_offset, inputs.output_offset
        return replace(
            inputs,
            initial_state=None if states is None else self.as_cached(states.unflatten(-2, heads)),
            state_offset=None if offsets is None else self.as_cached(offsets.unflatten(-2, heads)),
            output_offset=None if outputs is None else outputs.unflatten(-1, heads),
        )

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        """The output (batch, seqlen, hidden_size) of the mixer from that of its heads and the gate."""
        raise NotImplementedError

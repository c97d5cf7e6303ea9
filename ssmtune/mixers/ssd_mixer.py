"""The forward pass that the mixers of the Mamba-2 family share, channels-last from the first projection to the last."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune import ops

from .cache import read_states
from .pads import CLOSED
from .recomputation import Recomputation
from .selective_mixer import SelectiveMixer
from .state_inputs import StateInputs, sum_state_inputs


class SsdMixer(SelectiveMixer):
    """A mixer of heads, each with one decay and one time step, whose input, B and C go through one convolution.

    Its adapters see the heads' channels as one axis: dim = num_heads * head_dim.
    """

    scan_operator = staticmethod(ops.ssd_scan)

    def mix(self, hidden_states: Tensor, cache: Any | None, attention_mask: Tensor | None) -> Tensor:
        """Run the mixer as `SelectiveMixer.mix` does; the offsets enter before the gated norm."""
        rows = hidden_states.shape[:2]
        hidden_states, pads, cu_seqlens = self.read_mask(hidden_states, cache, attention_mask)
        inputs = sum_state_inputs(self, cu_seqlens, rows[1])
        context, state = read_states(cache, self.layer_idx, self.conv_kernel_size)
        step = hidden_states.shape[1] == 1 and state is not None and not torch.is_grad_enabled()
        inputs = inputs.at_every_token() if step else inputs.of_rows()

        gate, x, dt = self.project(hidden_states)
        with Recomputation(self.recompute != "nothing") as made:
            u = self.convolve_tokens(made, x, context, inputs, cache, pads, cu_seqlens, step)
            if step:
                y = self.advance_heads(u[..., 0], dt[:, 0], pads, state, inputs, self.scan_gate(gate))
            else:
                y, last_state = self.scan_heads(made, u, dt, pads, state, inputs, cu_seqlens, self.scan_gate(gate))
        if cache is not None and not step:
            cache.update_recurrent_state(last_state, self.layer_idx)
        out = self.out_proj(self.normalize(y.flatten(2), gate))
        return out if cu_seqlens is None else out.view(*rows, -1)

    def scan_heads(
        self,
        made: Recomputation,
        u: Tensor,
        dt: Tensor,
        pads: Tensor | None = None,
        state: Tensor | None = None,
        inputs: StateInputs | None = None,
        cu_seqlens: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scan what the convolution gave.

        Args:
            made: what is made again in the backward pass.
            u: (batch, conv_dim, seqlen), of which the channels are the input's, B's and C's.
            dt: (batch, seqlen, num_heads).
            pads: (batch, seqlen, 1), or None.
            state: (batch, num_heads, head_dim, dstate), what a cache holds.
            inputs: what adapters add.
            cu_seqlens: (n_sequences + 1,).
            gate: (batch, seqlen, dim), for mixers that gate within the scan.

        Returns:
            (batch, seqlen, num_heads, head_dim), and the last state.
        """
        inputs = self.by_heads(inputs or StateInputs())
        x, B, C = self.split_convolved(u.transpose(1, 2))
        steps = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": tuple(self.time_step_limit)}
        if pads is not None:
            # A step of size zero: a pad neither enters the state nor lets it decay, also a learned initial state.
            if steps["dt_limit"][0] > 0:
                dt, steps = self.time_steps(dt).masked_fill(pads, 0), {}
            else:
                dt = made.by(Tensor.masked_fill, dt, pads, CLOSED)
        return self.scan(
            made,
            x, dt, self.state_matrix(), B, C, self.skip_weight(), z=None if gate is None else gate.view_as(x),
            initial_states=inputs.initial_state if state is None else state,
            state_offset=inputs.state_offset, output_offset=inputs.output_offset,
            return_final_states=True, cu_seqlens=cu_seqlens, **steps,
        )  # fmt: skip

    def advance_heads(
        self,
        u: Tensor,
        dt: Tensor,
        pads: Tensor | None,
        state: Tensor,
        inputs: StateInputs,
        gate: Tensor | None,
    ) -> Tensor:
        """`scan_heads` for one token, u (batch, conv_dim) and dt (batch, num_heads), which overwrites the state."""
        inputs, dtype = self.by_heads(inputs), u.dtype
        steps = {"dt_bias": self._of_channels(self.dt_bias), "dt_softplus": True}
        if tuple(self.time_step_limit) != (0.0, math.inf):
            # Which the operator does not know: it gets the steps as they are, in their precision.
            dt, steps = self.time_steps(dt), {}
            u, gate = u.to(dt.dtype), None if gate is None else gate.to(dt.dtype)
        if pads is not None:
            dt = dt.masked_fill(pads[:, 0], CLOSED if steps else 0)
        x, B, C = self.split_convolved(u)
        A, D = self._of_channels(self.state_matrix()).unsqueeze(-1).expand(state.shape[1:]), self.skip_weight()
        y = ops.selective_state_update(
            state, x, self._of_channels(dt), A, B, C, D if D.dim() == 2 else self._of_channels(D),
            z=None if gate is None else gate.view_as(x), state_offset=inputs.state_offset,
            output_offset=inputs.output_offset, adapter_index=inputs.adapter_index, **steps,
        )  # fmt: skip
        return y.unsqueeze(1).to(dtype)

    def _of_channels(self, x: Tensor) -> Tensor:
        """What heads share (…, num_heads) as a view of what their channels have."""
        return x.unsqueeze(-1).expand(*x.shape, self.head_dim)

    def split_convolved(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, num_heads, head_dim), B and C (…, groups, dstate), from what the convolution gave (…, conv_dim)."""
        states = self.n_groups * self.ssm_state_size
        x, B, C = u.split([self.intermediate_size, states, states], dim=-1)
        groups = self.n_groups, self.ssm_state_size
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def by_heads(self, inputs: StateInputs) -> StateInputs:
        """The same with the channels of states and outputs by heads."""
        heads = self.num_heads, self.head_dim
        states, offsets, outputs = inputs.initial_state, inputs.state_offset, inputs.output_offset
        return replace(
            inputs,
            initial_state=None if states is None else states.unflatten(-2, heads),
            state_offset=None if offsets is None else offsets.unflatten(-2, heads),
            output_offset=None if outputs is None else outputs.unflatten(-1, heads),
        )

    def states_after(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        _, x, dt = self.project(hidden_states)
        x = x.transpose(1, 2)
        with Recomputation(self.recompute != "nothing") as made:
            _, state = self.scan_heads(made, self.convolve(made, x, None, None), dt)
        width = self.conv_kernel_size - 1
        return state.flatten(1, 2), F.pad(x, (width, 0))[..., x.shape[-1] :]

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, the input of the convolution and the time steps, each (batch, seqlen, its channels)."""
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        return self.in_proj(hidden_states).split(sizes, dim=-1)

    def time_steps(self, dt: Tensor) -> Tensor:
        """The time steps as the recurrence takes them, in float32 or wider."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)

    def state_matrix(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def skip_weight(self) -> Tensor:
        """D (num_heads,) or (num_heads, head_dim)."""
        return self.D

    def scan_gate(self, gate: Tensor) -> Tensor | None:
        """The gate of the scan: none, for it is the norm after it that gates."""
        return None

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm of what the scan gave, both (batch, seqlen, dim)."""
        return self.norm(y, gate)

"""What the mixers of the Mamba-2 family share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune import ops

from .head_mixer import HeadMixer
from .pads import CLOSED
from .recomputation import Recomputation
from .state_inputs import StateInputs


class SsdMixer(HeadMixer):
    """A mixer of heads, each with one decay and one time step, whose input, B and C go through one convolution."""

    scan_operator = staticmethod(ops.ssd_scan)
    why_no_extra_states = "the states of a head share one decay"

    @staticmethod
    def state_axes(mixer: nn.Module) -> tuple[int, ...]:
        return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size

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
        inputs = self.by_heads(inputs or StateInputs())
        x, B, C = self.split_convolved(u.transpose(1, 2))
        steps = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": tuple(self.time_step_limit)}
        if pads is not None:
            # A step of size zero: a pad neither enters the state nor lets it decay, also a learned initial state.
            if steps["dt_limit"][0] > 0:
                dt, steps = self.time_steps(dt).masked_fill(pads, 0), {}
            else:
                dt = made.by(Tensor.masked_fill, dt, pads, CLOSED)
        gate = None if gate is None else self.scan_gate(gate)
        return self.scan(
            made,
            x, dt, self.state_matrix(), B, C, self.skip_weight(), z=None if gate is None else gate.view_as(x),
            initial_states=inputs.initial_state if state is None else state,
            state_offset=inputs.state_offset, output_offset=inputs.output_offset,
            return_final_states=True, cu_seqlens=cu_seqlens, **steps,
        )  # fmt: skip

    def advance_heads(
        self,
        made: Recomputation,
        u: Tensor,
        dt: Tensor,
        pads: Tensor | None,
        state: Tensor,
        inputs: StateInputs,
        gate: Tensor,
    ) -> Tensor:
        inputs, dtype = self.by_heads(inputs), u.dtype
        u, dt, gate = u[..., 0], dt[:, 0], self.scan_gate(gate)
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

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.normalize(y.flatten(2), gate))

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm of what the scan gave, both (batch, seqlen, dim)."""
        return self.norm(y, gate)

"""The forward pass that the mixers of the Mamba-2 family share, channels-last from the first projection to the last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune import ops

from .cache import read_states
from .selective_mixer import _CLOSED, SelectiveMixer, _is_plain, find_pads, place_conv_state
from .state_inputs import StateInputs, sum_state_inputs


class SsdMixer(SelectiveMixer):
    """A mixer of heads, each with one decay and one time step, whose input, B and C go through one convolution.

    Its adapters see the heads' channels as one axis: dim = num_heads * head_dim.
    """

    def mix(self, hidden_states: Tensor, cache: Any | None, attention_mask: Tensor | None) -> Tensor:
        """Run the mixer as `SelectiveMixer.mix` does; the offsets enter before the gated norm."""
        cu_seqlens, rows = None, hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.dim() == 1:
            cu_seqlens, attention_mask = attention_mask, None
            if cache is not None:
                raise ValueError(
                    f"{type(self).__name__} got {cu_seqlens.shape[0] - 1} packed sequences together with a cache.\n"
                    "  Only a single sequence can be continued. Leave the cache out, as with use_cache=False."
                )
            hidden_states = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        batch, seqlen, _ = hidden_states.shape
        pads = find_pads(attention_mask, batch, seqlen)
        inputs = sum_state_inputs(self).of_rows()
        context, state = read_states(cache, self.layer_idx, self.conv_kernel_size)

        gate, x, dt = self.project(hidden_states)
        if pads is not None:
            # After the projection rather than before it: its bias must not reach the convolution.
            x = x.masked_fill(pads, 0)
        x = x.transpose(1, 2)
        step = seqlen == 1 and state is not None and not torch.is_grad_enabled()
        window = x
        if cu_seqlens is not None and inputs.conv_state is not None:
            context = inputs.conv_state.to(x.dtype).expand(cu_seqlens.shape[0] - 1, -1, -1)
        elif context is None and inputs.conv_state is not None:
            context, x = place_conv_state(inputs.conv_state, x, pads)
            # The cache, empty so far, has to hold of the learned inputs what the convolution still looks back on.
            window = x if cache is None else torch.cat([context, x], dim=-1)
        if step and not cache.layers[self.layer_idx].record_past and _is_plain(self.conv1d, nn.Conv1d):
            u = self.convolve_step(x, context)
        else:
            u = self.convolve(x, context, cu_seqlens)
            if cache is not None:
                cache.update_conv_state(window, self.layer_idx, conv_kernel_size=self.conv_kernel_size)

        y, last_state = self.scan(u, dt, pads, state, inputs, cu_seqlens, self.scan_gate(gate))
        if cache is not None:
            cache.update_recurrent_state(last_state, self.layer_idx)
        out = self.out_proj(self.normalize(y.flatten(2), gate))
        return out if cu_seqlens is None else out.view(*rows, -1)

    def scan(
        self,
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
        inputs = inputs or StateInputs()
        heads = self.num_heads, self.head_dim
        states = self.n_groups * self.ssm_state_size
        x, B, C = u.transpose(1, 2).split([self.intermediate_size, states, states], dim=-1)
        steps = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": tuple(self.time_step_limit)}
        if pads is not None:
            # A step of size zero: a pad neither enters the state nor lets it decay, also a learned initial state.
            if steps["dt_limit"][0] > 0:
                dt, steps = self.time_steps(dt).masked_fill(pads, 0), {}
            else:
                dt = dt.masked_fill(pads, _CLOSED)
        if state is None and inputs.initial_state is not None:
            state = inputs.initial_state.unflatten(-2, heads)
        return ops.ssd_scan(
            x.unflatten(-1, heads), dt, self.state_matrix(),
            B.unflatten(-1, (self.n_groups, -1)), C.unflatten(-1, (self.n_groups, -1)), self.D,
            z=None if gate is None else gate.unflatten(-1, heads), initial_states=state,
            state_offset=None if inputs.state_offset is None else inputs.state_offset.unflatten(-2, heads),
            output_offset=None if inputs.output_offset is None else inputs.output_offset.unflatten(-1, heads),
            return_final_states=True, cu_seqlens=cu_seqlens, **steps,
        )  # fmt: skip

    def states_after(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        _, x, dt = self.project(hidden_states)
        x = x.transpose(1, 2)
        _, state = self.scan(self.convolve(x, None, None), dt)
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

    def scan_gate(self, gate: Tensor) -> Tensor | None:
        """The gate of the scan: none, for it is the norm after it that gates."""
        return None

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm of what the scan gave, both (batch, seqlen, dim)."""
        return self.norm(y, gate)

"""The forward pass that the mixers of the Mamba-1 family share, channels-last from the first projection to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune import ops
from ssmtune.ops.backends import requested

from .cache import read_states
from .pads import CLOSED, find_pads, place_conv_state
from .recomputation import Recomputation
from .state_inputs import StateInputs, adapters_of, sum_state_inputs, with_extra_states


class SelectiveMixer(nn.Module):
    """A transformers mixer whose forward pass runs on `ssmtune.ops`.

    Mixed into a transformers class by one small class per architecture, which names that class in `original_class` and
    overrides what it does differently. It adds no parameters, so that an instance changes by its class alone.

    For the backward pass it keeps what `in_proj` and `x_proj` gave, and what the scan left. The output of the
    convolution and the time step are made again, unless a wrapped `conv1d` or `dt_proj` makes them. `recompute` is
    "cheap" for that, "scan" to run the scan again too, and "nothing" to keep everything.
    """

    original_class: ClassVar[type[nn.Module]]
    scan_operator: ClassVar[Callable[..., Any]] = staticmethod(ops.selective_scan)
    # The operator by whose backend `patch` says where a mixer runs.
    kernel: ClassVar[str] = "selective_scan"
    # Why adapters cannot give the recurrence states beside those of the mixer, or None if they can.
    why_no_extra_states: ClassVar[str | None] = None
    recompute = "cheap"

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        return self.mix(hidden_states, cache_params, attention_mask if cu_seqlens is None else cu_seqlens)

    @staticmethod
    def state_axes(mixer: nn.Module) -> tuple[int, ...]:
        """The axes of the state of a mixer of `original_class`, patched or not: its channels, and last the states."""
        return tuple(mixer.A_log.shape)

    @staticmethod
    def as_cached(state: Tensor) -> Tensor:
        """A state (batch, *state_axes) as a cache holds it, or the other way round."""
        return state

    def mix(self, hidden_states: Tensor, cache: Any | None, attention_mask: Tensor | None) -> Tensor:
        """Run the mixer on hidden states, starting from what the cache holds.

        Every projection is called as a module, so that an adapter on any of them takes effect. The one exception is a
        `dt_proj` that is a plain `nn.Linear`: its bias goes to the scan, which adds it in float32. A bfloat16 sum near
        -6, where trained biases lie, would be off by up to 1.6 % of the step size. A wrapped `dt_proj` adds its bias
        itself, in the precision of the model.

        Args:
            hidden_states: (batch, seqlen, hidden_size).
            cache: a transformers `Cache`, read and updated in place; None runs the sequence on its own.
            attention_mask: (batch, seqlen) or longer, then its last columns count. Zero marks a pad: it enters neither
                the convolution nor the state. One between cached tokens and new ones still takes a place in the window
                of the convolution, as a zero. Or cu_seqlens (n_sequences + 1,), integers: where in the rows, taken
                one after the other, each of the packed sequences starts, and the end.

        Returns:
            (batch, seqlen, hidden_size).

        Raises:
            ValueError: the mask has another shape, or sequences are packed and there is a cache.
        """
        rows = hidden_states.shape[:2]
        hidden_states, pads, cu_seqlens = self.read_mask(hidden_states, cache, attention_mask)
        batch, seqlen, _ = hidden_states.shape
        inputs = sum_state_inputs(self, cu_seqlens, rows[1])
        context, state = read_states(cache, self.layer_idx, self.conv_kernel_size)

        projected = self.in_proj(hidden_states)
        with Recomputation(self.recompute != "nothing") as made:
            x, z = self.split_input(made, projected)
            # One token of generation, for which cached states are overwritten rather than read and written.
            step = seqlen == 1 and state is not None and not torch.is_grad_enabled()
            # The step reads offsets from stacks of them; the convolution and the scan want a tensor for each row.
            inputs = inputs.at_every_token() if step else inputs.of_rows()
            u = self.convolve_tokens(made, x, context, inputs, cache, pads, cu_seqlens, step)
            with made.casting():
                dt, B, C = self.project_convolved(u.transpose(1, 2))
            delta, delta_bias = self.project_time_step(made, dt)
            if pads is not None:
                # A step of size zero: a pad neither enters the state nor lets it decay, also a learned initial state.
                delta = made.by(Tensor.masked_fill, delta, pads, CLOSED)
            A, B, C, inputs = with_extra_states(self, u.transpose(1, 2), self.state_matrix(), B, C, inputs)
            delta, B, C, D = delta.transpose(1, 2), B.movedim(1, -1), C.movedim(1, -1), self.D.flatten()
            if state is not None:
                # A view, which is overwritten.
                state = state.view(batch, -1, state.shape[-1])

            if step:
                y = ops.selective_state_update(
                    state, u[..., 0], delta[..., 0], A, B[..., 0], C[..., 0], D,
                    z=z[:, 0], dt_bias=delta_bias, dt_softplus=True,
                    state_offset=inputs.state_offset, output_offset=inputs.output_offset,
                    adapter_index=inputs.adapter_index,
                ).unsqueeze(1)  # fmt: skip
            else:
                y = self.scan(
                    made, u, delta, A, B, C, D,
                    z=z.transpose(1, 2), delta_bias=delta_bias, delta_softplus=True,
                    return_last_state=cache is not None,
                    initial_state=inputs.initial_state if state is None else state,
                    state_offset=inputs.state_offset, output_offset=inputs.output_offset, cu_seqlens=cu_seqlens,
                )  # fmt: skip
                if cache is not None:
                    y, last_state = y
                    cache.update_recurrent_state(last_state.unflatten(1, self.A_log.shape[:-1]), self.layer_idx)
                y = y.transpose(1, 2)
            out = self.out_proj(y)
        return out if cu_seqlens is None else out.view(*rows, -1)

    def read_mask(
        self, hidden_states: Tensor, cache: Any | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The hidden states, packed sequences in one row, where the pads are, and where packed sequences start."""
        if attention_mask is None or attention_mask.dim() != 1:
            return hidden_states, find_pads(attention_mask, *hidden_states.shape[:2]), None
        if cache is not None:
            raise ValueError(
                f"{type(self).__name__} got {attention_mask.shape[0] - 1} packed sequences together with a cache.\n"
                "  Only a single sequence can be continued. Leave the cache out, as with use_cache=False."
            )
        return hidden_states.reshape(1, -1, hidden_states.shape[-1]), None, attention_mask

    def convolve_tokens(
        self,
        made: Recomputation,
        x: Tensor,
        context: Tensor | None,
        inputs: StateInputs,
        cache: Any | None,
        pads: Tensor | None,
        cu_seqlens: Tensor | None,
        step: bool,
    ) -> Tensor:
        """Convolve (batch, seqlen, dim) to (batch, dim, seqlen), go on from what a cache holds, and update that."""
        if pads is not None:
            # After the projection rather than before it: its bias must not reach the convolution.
            x = made.by(Tensor.masked_fill, x, pads, 0)
        window = x = x.transpose(1, 2)
        if cu_seqlens is not None and inputs.conv_state is not None:
            context = inputs.conv_state.to(x.dtype).expand(cu_seqlens.shape[0] - 1, -1, -1)
        elif context is None and inputs.conv_state is not None:
            context, x = made.by(place_conv_state, inputs.conv_state, x, pads)
            # The cache, empty so far, has to hold of the learned inputs what the convolution still looks back on.
            window = x if cache is None else torch.cat([context, x], dim=-1)
        if step and not cache.layers[self.layer_idx].record_past and _is_plain(self.conv1d, nn.Conv1d):
            return self.convolve_step(x, context)
        u = self.convolve(made, x, context, cu_seqlens)
        if cache is not None:
            cache.update_conv_state(window, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        return u

    def states_after(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens leave behind for those after them, were they the first of a sequence.

        Args:
            hidden_states: (batch, seqlen, hidden_size), without pads.

        Returns:
            The state (batch, dim, dstate), float32, and the inputs (batch, dim, width - 1) that the convolution looks
            back on, zero where there are fewer tokens.
        """
        projected = self.in_proj(hidden_states)
        with Recomputation(self.recompute != "nothing") as made:
            x = self.split_input(made, projected)[0].transpose(1, 2)
            u = self.convolve(made, x, None, None)
            dt, B, C = self.project_convolved(u.transpose(1, 2))
            delta, delta_bias = self.project_time_step(made, dt)
            _, state = self.scan(
                made, u, delta.transpose(1, 2), self.state_matrix(), B.movedim(1, -1), C.movedim(1, -1),
                delta_bias=delta_bias, delta_softplus=True, return_last_state=True,
            )  # fmt: skip
        width = self.conv_kernel_size - 1
        return state, F.pad(x, (width, 0))[..., x.shape[-1] :]

    def scan(self, made: Recomputation, *args: Any, **kwargs: Any) -> Any:
        """The operator of the scan, what its backward pass needs kept or made again."""
        if self.recompute == "scan":
            return made.by(self.scan_operator, *args, backend=requested(), **kwargs)
        return self.scan_operator(*args, **kwargs)

    def state_matrix(self) -> Tensor:
        """A (dim, dstate), negative, in float32 or wider."""
        A_log = self.A_log.flatten(0, -2)
        A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
        for adapter in adapters_of(self):
            A = adapter.change_matrix(A)
        return A

    def convolve(self, made: Recomputation, x: Tensor, context: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Causal convolution and activation of (batch, dim, seqlen), with the inputs left of it or zeros."""
        conv = self.conv1d
        silu = self.activation in ("silu", "swish")
        if _is_plain(conv, nn.Conv1d):
            u = made.by(
                ops.causal_conv1d, x, conv.weight.squeeze(1), conv.bias,
                initial_states=context, activation="silu" if silu else None, cu_seqlens=cu_seqlens, backend=requested(),
            )  # fmt: skip
            return u if silu else self.act(u)
        if cu_seqlens is not None:
            pieces = x.split(cu_seqlens.diff().tolist(), dim=-1)
            contexts = [None] * len(pieces) if context is None else context.split(1)
            return torch.cat(
                [self.convolve(made, piece, left, None) for piece, left in zip(pieces, contexts, strict=True)], dim=-1
            )
        # The module pads by conv_kernel_size - 1 on both sides; its output i ends at input i.
        start = 0 if context is None else context.shape[-1]
        if context is not None:
            x = torch.cat([context.to(x.dtype), x], dim=-1)
        return self.act(conv(x)[..., start : x.shape[-1]])

    def convolve_step(self, x: Tensor, context: Tensor) -> Tensor:
        """`convolve` for a single input (batch, dim, 1), which also moves the inputs left of it on, in place."""
        silu = self.activation in ("silu", "swish")
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        u = ops.causal_conv1d_update(x[..., 0], context, weight, bias, activation="silu" if silu else None)
        return (u if silu else self.act(u)).unsqueeze(-1)

    def split_input(self, made: Recomputation, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the convolution and the gate, both (batch, seqlen, dim), from what `in_proj` gave."""
        return projected.chunk(2, dim=-1)

    def project_convolved(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan reads from its input u (batch, seqlen, dim).

        Returns:
            dt (batch, seqlen, rank), from which `project_time_step` makes the time step, and B and C (batch, seqlen,
            dstate). An architecture with groups of channels has one more axis, for the group, after seqlen.
        """
        dt, B, C = self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        for adapter in adapters_of(self):
            B, C = adapter.change_projections(u, B, C)
        return dt, B, C

    def project_time_step(self, made: Recomputation, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The time step per channel (batch, seqlen, dim), and the bias (dim,) that the scan still has to add to it."""
        dt_proj = self.dt_proj
        if _is_plain(dt_proj, nn.Linear):
            return made.by(F.linear, dt, dt_proj.weight), dt_proj.bias
        return dt_proj(dt), None


class NormalizingMixer(SelectiveMixer):
    """A mixer with norms, as modules of its own, on dt, B and C."""

    def project_convolved(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = super().project_convolved(u)
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether reading the parameters of a module does all that calling it would: no adapter, hook or offloading."""
    return type(module) is cls and not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )

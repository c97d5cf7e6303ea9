"""torch.ops.ssmtune.selective_scan_fwd and _bwd: schema, shapes for tracing, autograd, and the call of a backend.

The name of the backend is an argument, so a traced or saved graph runs on the backend it was traced with.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.ops import layout
from ssmtune.ops.backends import implementation
from ssmtune.ops.gradients import (
    check_states_are_kept,
    one_for_each,
    refuse_second_derivatives,
    takes_scan,
    wanted_gradients,
)
from ssmtune.ops.reference import compute_dtype, grouped, has_rows
from ssmtune.ops.reference_backward import state_offset_gradient

INPUTS = (
    *("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    *("initial_state", "state_offset", "output_offset"),
)

_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens"
)

torch.library.define(
    "ssmtune::selective_scan_fwd",
    f"({_TENSORS}, bool delta_softplus, bool keep_states, str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ssmtune::selective_scan_bwd",
    f"(Tensor? dout, Tensor? dlast_state, {_TENSORS}, Tensor chunk_states, bool delta_softplus, bool[] wanted, "
    "str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::selective_scan_fwd")
def _allocate_results(*args) -> tuple[Tensor, Tensor, Tensor]:
    u, A, B, cu_seqlens, keep_states, backend = *args[0:1], *args[2:4], args[11], *args[-2:]
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    groups = B.shape[1] if B.dim() == 4 else 1
    n_sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (0,)
    if keep_states:
        shape = implementation(backend).chunk_states_shape(batch, dim, seqlen, dstate, groups, n_sequences)
    dtype = compute_dtype(u)
    return (
        layout.empty_like(u),
        u.new_empty(batch if n_sequences is None else n_sequences, dim, dstate, dtype=dtype),
        u.new_empty(shape, dtype=dtype),
    )


@torch.library.impl("ssmtune::selective_scan_fwd", "CompositeExplicitAutograd")
def _forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (cu_seqlens, delta_softplus, keep_states, backend) = args[:-4], args[-4:]
    out, last_state, chunk_states = _allocate_results(*args)
    implementation(backend).selective_scan_forward(
        inputs, cu_seqlens, delta_softplus, out, last_state, chunk_states if keep_states else None
    )
    return out, last_state, chunk_states


def allocate_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor | None]:
    u = inputs[0]
    dtype = compute_dtype(u)
    gradients = []
    for name, tensor, is_wanted in zip(INPUTS, inputs, wanted, strict=True):
        if not is_wanted:
            gradients.append(None)
        elif name in ("u", "delta", "z"):
            gradients.append(layout.empty_like(tensor, u.dtype))
        elif name in ("B", "C"):
            *rows, dstate, seqlen = tensor.shape
            gradients.append(tensor.new_empty(*rows, seqlen, dstate, dtype=dtype).transpose(-2, -1))
        else:
            gradients.append(tensor.new_empty(tensor.shape, dtype=dtype))
    return gradients


@torch.library.register_fake("ssmtune::selective_scan_bwd")
def _fake_backward(dout, dlast_state, *args) -> list[Tensor]:
    inputs, wanted = args[:-5], args[-2]
    return wanted_gradients(inputs, allocate_gradients(inputs, wanted))


@torch.library.impl("ssmtune::selective_scan_bwd", "CompositeExplicitAutograd")
def _backward(dout, dlast_state, *args) -> list[Tensor]:
    inputs, (cu_seqlens, chunk_states, delta_softplus, wanted, backend) = args[:-5], args[-5:]
    gradients = allocate_gradients(inputs, wanted)
    implementation(backend).selective_scan_backward(
        dout, dlast_state, inputs, cu_seqlens, chunk_states, delta_softplus, gradients
    )
    return wanted_gradients(inputs, gradients)


needs_scan = partial(takes_scan, INPUTS, has_rows)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, ctx.delta_softplus, keep_states, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.needs_scan = needs_scan(tensors, ctx.needs_input_grad[: len(INPUTS)], cu_seqlens)
    if ctx.needs_scan:
        check_states_are_kept("selective_scan", keep_states)
        ctx.save_for_backward(*tensors, cu_seqlens, output[2])
        return
    ctx.shapes = [None if tensor is None else tensor.shape for tensor in tensors]
    u, _, _, _, C, _, z, *_ = tensors
    ctx.save_for_backward(u if ctx.needs_input_grad[INPUTS.index("D")] else None, C, z)


def _autograd(ctx, dout, dlast_state, _) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[: len(INPUTS)])
    if not ctx.needs_scan:
        gradients = _gradients_without_scan(ctx, dout, wanted)
    elif dout is None and dlast_state is None:
        gradients = [None] * len(INPUTS)
    else:
        *inputs, cu_seqlens, chunk_states = ctx.saved_tensors
        computed = torch.ops.ssmtune.selective_scan_bwd(
            *(dout, dlast_state, *inputs, cu_seqlens, chunk_states, ctx.delta_softplus, wanted, ctx.backend)
        )
        gradients = one_for_each(computed, wanted)
    return *gradients, None, None, None, None


def _gradients_without_scan(ctx, dout: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    gradients = dict.fromkeys(INPUTS)
    if dout is not None:
        u, C, z = ctx.saved_tensors
        shapes = dict(zip(INPUTS, ctx.shapes, strict=True))
        asked = {name for name, is_wanted in zip(INPUTS, wanted, strict=True) if is_wanted}
        dtype = compute_dtype(dout)
        g = dout.to(dtype) if z is None else dout.to(dtype) * F.silu(z.to(dtype))
        if "D" in asked:
            gradients["D"] = (g * u.to(dtype)).sum((0, 2))
        if "state_offset" in asked:
            # (batch, groups, dstate, seqlen)
            C = grouped(C.to(dtype))
            if len(shapes["state_offset"]) == 3:
                gradients["state_offset"] = state_offset_gradient(g, C)
            else:
                # (groups, dim / groups, batch * seqlen) @ (groups, batch * seqlen, dstate)
                by_group = g.unflatten(1, (C.shape[1], -1)).permute(1, 2, 0, 3).flatten(2)
                gradients["state_offset"] = (by_group @ C.permute(1, 0, 3, 2).flatten(1, 2)).flatten(0, 1)
        if "output_offset" in asked:
            gradients["output_offset"] = g.sum(2) if len(shapes["output_offset"]) == 2 else g.sum((0, 2))
    return list(gradients.values())


torch.library.register_autograd("ssmtune::selective_scan_fwd", _autograd, setup_context=_setup_context)


refuse_second_derivatives(
    "selective_scan",
    "Differentiate ssmtune.ops.reference.selective_scan_reference twice instead, or drop create_graph=True.",
)

selective_scan_fwd = torch.ops.ssmtune.selective_scan_fwd.default

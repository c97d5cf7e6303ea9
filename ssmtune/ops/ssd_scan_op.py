"""torch.ops.ssmtune.ssd_scan_fwd and _bwd: schema, shapes for tracing, autograd, and the call of a backend."""

from functools import partial

import torch
from torch import Tensor

from ssmtune.ops.gradients import (
    check_states_are_kept,
    one_for_each,
    refuse_second_derivatives,
    takes_scan,
    wanted_gradients,
)
from ssmtune.ops.reference import compute_dtype
from ssmtune.ops.ssd_scan_backends import ssd_backend

INPUTS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "state_offset", "output_offset")
_DIMENSIONS_WITH_ROWS = {"state_offset": 4, "output_offset": 3}

_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens"
)

torch.library.define(
    "ssmtune::ssd_scan_fwd",
    f"({_TENSORS}, bool dt_softplus, float dt_min, float dt_max, bool keep_states, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ssmtune::ssd_scan_bwd",
    f"(Tensor? dout, Tensor? dfinal_states, {_TENSORS}, Tensor chunk_states, bool dt_softplus, float dt_min, "
    "float dt_max, bool[] wanted, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::ssd_scan_fwd")
def _allocate_results(*args) -> tuple[Tensor, Tensor, Tensor]:
    x, B, cu_seqlens, keep_states, backend = args[0], args[3], args[10], *args[-2:]
    groups, dstate = B.shape[2:]
    n_sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = ssd_backend(backend).chunk_states_shape(x.shape, groups, dstate, n_sequences) if keep_states else (0,)
    rows, dtype = x.shape[0] if n_sequences is None else n_sequences, compute_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, *x.shape[2:], dstate, dtype=dtype),
        x.new_empty(shape, dtype=dtype),
    )


@torch.library.impl("ssmtune::ssd_scan_fwd", "CompositeExplicitAutograd")
def _forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    inputs, cu_seqlens, (*options, keep_states, backend) = args[:10], args[10], args[11:]
    out, final_states, chunk_states = _allocate_results(*args)
    kept = chunk_states if keep_states else None
    ssd_backend(backend).forward(inputs, cu_seqlens, *options, out, final_states, kept)
    return out, final_states, chunk_states


def _allocate_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor | None]:
    dtype = compute_dtype(inputs[0])
    return [
        tensor.new_empty(tensor.shape, dtype=tensor.dtype if name == "x" else dtype) if is_wanted else None
        for name, tensor, is_wanted in zip(INPUTS, inputs, wanted, strict=True)
    ]


@torch.library.register_fake("ssmtune::ssd_scan_bwd")
def _fake_backward(dout, dfinal_states, *args) -> list[Tensor]:
    inputs, wanted = args[:10], args[-2]
    return wanted_gradients(inputs, _allocate_gradients(inputs, wanted))


@torch.library.impl("ssmtune::ssd_scan_bwd", "CompositeExplicitAutograd")
def _backward(dout, dfinal_states, *args) -> list[Tensor]:
    inputs, (cu_seqlens, chunk_states, *options, wanted, backend) = args[:10], args[10:]
    gradients = _allocate_gradients(inputs, wanted)
    ssd_backend(backend).backward(dout, dfinal_states, inputs, cu_seqlens, chunk_states, *options, gradients)
    return wanted_gradients(inputs, gradients)


def _has_rows(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == _DIMENSIONS_WITH_ROWS.get(name)


needs_scan = partial(takes_scan, INPUTS, _has_rows)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, dt_softplus, dt_min, dt_max, keep_states, ctx.backend = inputs
    ctx.options = dt_softplus, dt_min, dt_max
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.needs_scan = needs_scan(tensors, ctx.needs_input_grad[: len(INPUTS)], cu_seqlens)
    if ctx.needs_scan:
        check_states_are_kept("ssd_scan", keep_states)
        ctx.save_for_backward(*tensors, cu_seqlens, output[2])
        return
    ctx.with_rows = [
        name for name, tensor in zip(INPUTS, tensors, strict=True) if tensor is not None and _has_rows(name, tensor)
    ]
    ctx.save_for_backward(tensors[0] if ctx.needs_input_grad[INPUTS.index("D")] else None, tensors[4])


def _autograd(ctx, dout, dfinal_states, _) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[: len(INPUTS)])
    if not ctx.needs_scan:
        gradients = _gradients_without_scan(ctx, dout, wanted)
    elif dout is None and dfinal_states is None:
        gradients = [None] * len(INPUTS)
    else:
        *inputs, cu_seqlens, chunk_states = ctx.saved_tensors
        computed = torch.ops.ssmtune.ssd_scan_bwd(
            *(dout, dfinal_states, *inputs, cu_seqlens, chunk_states, *ctx.options, wanted, ctx.backend)
        )
        gradients = one_for_each(computed, wanted)
    return *gradients, None, None, None, None, None, None


def _gradients_without_scan(ctx, dout: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    gradients = dict.fromkeys(INPUTS)
    if dout is None:
        return list(gradients.values())
    x, C = ctx.saved_tensors
    g = dout.to(compute_dtype(dout))
    for name in (name for name, is_wanted in zip(INPUTS, wanted, strict=True) if is_wanted):
        row = "b" if name in ctx.with_rows else ""
        if name == "D":
            gradients[name] = (g * x.to(g.dtype)).sum((0, 1))
        elif name == "output_offset":
            gradients[name] = g.sum(1) if row else g.sum((0, 1))
        else:
            by_group = g.unflatten(2, (C.shape[2], -1))
            gradient = torch.einsum(f"blgrp,blgn->{row}grpn", by_group, C.to(g.dtype))
            gradients[name] = gradient.flatten(-4, -3)
    return list(gradients.values())


torch.library.register_autograd("ssmtune::ssd_scan_fwd", _autograd, setup_context=_setup_context)


refuse_second_derivatives("ssd_scan", "Drop create_graph=True.")

ssd_scan_fwd = torch.ops.ssmtune.ssd_scan_fwd.default

"""torch.ops.ssmtune.causal_conv1d_fwd and _bwd: schema, shapes for tracing, autograd, and the call of a backend."""

import torch
from torch import Tensor

from ssmtune.ops import layout
from ssmtune.ops.backends import implementation
from ssmtune.ops.gradients import one_for_each, refuse_second_derivatives, wanted_gradients
from ssmtune.ops.reference import compute_dtype

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? cu_seqlens"
_DIFFERENTIABLE = 4

torch.library.define(
    "ssmtune::causal_conv1d_fwd",
    f"({_TENSORS}, bool silu, bool return_final_states, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ssmtune::causal_conv1d_bwd",
    f"(Tensor? dout, Tensor? dfinal_states, {_TENSORS}, bool silu, bool[] wanted, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::causal_conv1d_fwd")
def _allocate_results(
    x, weight, bias, initial_states, cu_seqlens, silu, return_final_states, backend
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, x.shape[1], weight.shape[1] - 1) if return_final_states else (0,)
    return layout.empty_like(x), x.new_empty(shape)


@torch.library.impl("ssmtune::causal_conv1d_fwd", "CompositeExplicitAutograd")
def _forward(*args) -> tuple[Tensor, Tensor]:
    inputs, (silu, return_final_states, backend) = args[:5], args[5:]
    out, final_states = _allocate_results(*args)
    implementation(backend).causal_conv1d_forward(inputs, silu, out, final_states if return_final_states else None)
    return out, final_states


def _allocate_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor | None]:
    x, *parameters = inputs
    gradients = [layout.empty_like(x) if wanted[0] else None]
    for tensor, is_wanted in zip(parameters, wanted[1:], strict=True):
        gradients.append(tensor.new_empty(tensor.shape, dtype=compute_dtype(x)) if is_wanted else None)
    return gradients


@torch.library.register_fake("ssmtune::causal_conv1d_bwd")
def _fake_backward(
    dout, dfinal_states, x, weight, bias, initial_states, cu_seqlens, silu, wanted, backend
) -> list[Tensor]:
    inputs = (x, weight, bias, initial_states)
    return wanted_gradients(inputs, _allocate_gradients(inputs, wanted))


@torch.library.impl("ssmtune::causal_conv1d_bwd", "CompositeExplicitAutograd")
def _backward(dout, dfinal_states, *args) -> list[Tensor]:
    inputs, (silu, wanted, backend) = args[:5], args[5:]
    gradients = _allocate_gradients(inputs[:_DIFFERENTIABLE], wanted)
    implementation(backend).causal_conv1d_backward(dout, dfinal_states, inputs, silu, gradients)
    return wanted_gradients(inputs[:_DIFFERENTIABLE], gradients)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu, return_final_states, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    if not return_final_states:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout, dfinal_states) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    if dout is None and dfinal_states is None:
        return (None,) * len(ctx.needs_input_grad)
    computed = torch.ops.ssmtune.causal_conv1d_bwd(
        dout, dfinal_states, *ctx.saved_tensors, ctx.silu, wanted, ctx.backend
    )
    return *one_for_each(computed, wanted), None, None, None, None


torch.library.register_autograd("ssmtune::causal_conv1d_fwd", _autograd, setup_context=_setup_context)


refuse_second_derivatives(
    "causal_conv1d",
    "Differentiate ssmtune.ops.reference.causal_conv1d_reference twice instead, or drop create_graph=True.",
)

causal_conv1d_fwd = torch.ops.ssmtune.causal_conv1d_fwd.default

"""torch.ops.ssmtune.causal_conv1d_fwd and _bwd: schema, shapes for tracing, autograd, and the call of a backend."""

import torch
from torch import Tensor

from ssmtune.ops import layout
from ssmtune.ops.backends import implementation
from ssmtune.ops.reference import compute_dtype

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states"

torch.library.define(
    "ssmtune::causal_conv1d_fwd",
    f"({_TENSORS}, bool silu, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ssmtune::causal_conv1d_bwd",
    f"(Tensor dout, {_TENSORS}, bool silu, bool[] wanted, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::causal_conv1d_fwd")
def _fake_forward(x, weight, bias, initial_states, silu, backend) -> Tensor:
    return layout.empty_like(x)


@torch.library.impl("ssmtune::causal_conv1d_fwd", "CompositeExplicitAutograd")
def _forward(x, weight, bias, initial_states, silu, backend) -> Tensor:
    out = layout.empty_like(x)
    implementation(backend).causal_conv1d_forward((x, weight, bias, initial_states), silu, out)
    return out


def _allocate_gradients(inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor | None]:
    x, *parameters = inputs
    gradients = [layout.empty_like(x) if wanted[0] else None]
    for tensor, is_wanted in zip(parameters, wanted[1:], strict=True):
        gradients.append(tensor.new_empty(tensor.shape, dtype=compute_dtype(x)) if is_wanted else None)
    return gradients


def _wanted_gradients(inputs: tuple[Tensor | None, ...], gradients: list[Tensor | None]) -> list[Tensor]:
    return [
        gradient.to(tensor.dtype) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None
    ]


@torch.library.register_fake("ssmtune::causal_conv1d_bwd")
def _fake_backward(dout, x, weight, bias, initial_states, silu, wanted, backend) -> list[Tensor]:
    inputs = (x, weight, bias, initial_states)
    return _wanted_gradients(inputs, _allocate_gradients(inputs, wanted))


@torch.library.impl("ssmtune::causal_conv1d_bwd", "CompositeExplicitAutograd")
def _backward(dout, x, weight, bias, initial_states, silu, wanted, backend) -> list[Tensor]:
    inputs = (x, weight, bias, initial_states)
    gradients = _allocate_gradients(inputs, wanted)
    implementation(backend).causal_conv1d_backward(dout, inputs, silu, gradients)
    return _wanted_gradients(inputs, gradients)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    computed = iter(torch.ops.ssmtune.causal_conv1d_bwd(dout, *ctx.saved_tensors, ctx.silu, wanted, ctx.backend))
    return *(next(computed) if is_wanted else None for is_wanted in wanted), None, None


torch.library.register_autograd("ssmtune::causal_conv1d_fwd", _autograd, setup_context=_setup_context)


def _second_derivative(ctx, *gradients):
    raise RuntimeError(
        "causal_conv1d has no second derivatives: its backward pass is a kernel, not a graph.\n"
        "  Differentiate ssmtune.ops.reference.causal_conv1d_reference twice instead, or drop create_graph=True."
    )


torch.library.register_autograd("ssmtune::causal_conv1d_bwd", _second_derivative)


causal_conv1d_fwd = torch.ops.ssmtune.causal_conv1d_fwd.default

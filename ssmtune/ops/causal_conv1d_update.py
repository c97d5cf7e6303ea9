"""One decoding step of the causal convolution."""

from torch import Tensor

from ssmtune.ops import arguments, backends, causal_conv1d_package, cuda, triton
from ssmtune.ops.causal_conv1d import check_activation
from ssmtune.ops.causal_conv1d_update_op import causal_conv1d_update as update
from ssmtune.ops.decoding import call_directly, check_overwritten

_OPTIONAL = frozenset({"bias"})


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve one more step with the steps before it, and move those on by one, in place.

        out[d] = bias[d] + sum_k weight[d, k] steps[d, k]          steps = conv_state, x          [then silu]
        conv_state <- the last width - 1 of steps

    The arguments are those of the function of the same name in https://github.com/Dao-AILab/causal-conv1d. There is no
    gradient.

    Args:
        x: (batch, dim). The next step, in float32, bfloat16 or float16; float64 runs on the reference.
        conv_state: (batch, dim, width - 1). The steps before x, oldest first, overwritten with those before the next
            one. A view is written through: that of the last width - 1 columns of a cache, for example.
        weight: (dim, width).
        bias: (dim,).
        activation: None, or "silu" (also called "swish").
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, dim) in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one.
        ValueError: a wrong shape, different devices, an empty batch, an expanded state, or an unknown activation or
            backend.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or the backend asked for cannot run
            the call.
    """
    op = "causal_conv1d_update"
    check_activation(op, activation)
    args = x, conv_state, weight, bias, activation is not None
    # on a GPU the package has the first say
    if not (isinstance(x, Tensor) and x.is_cuda and causal_conv1d_package.is_there()):
        out = call_directly(op, x, backend, args)
        if out is not None:
            return out
    tensors = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
    arguments.check_tensors(op, "x", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "x", x, ("batch", "dim"))
    arguments.check_dimensions(op, "weight", weight, ("dim", "width"))
    sizes = {"batch": x.shape[0], "dim": x.shape[1], "width": weight.shape[1], "width - 1": weight.shape[1] - 1}
    arguments.check_shape(op, "weight", weight, (("dim", "width"),), sizes, "dim is that of x.")
    arguments.check_shape(op, "bias", bias, (("dim",),), sizes, "dim is that of x.")
    why = "batch and dim are those of x, width is that of weight."
    arguments.check_shape(op, "conv_state", conv_state, (("batch", "dim", "width - 1"),), sizes, why)
    instead = "causal_conv1d on a sequence of length 1\n  with initial_states=conv_state and return_final_states=True"
    check_overwritten(op, "conv_state", tensors, instead)

    refusals = {"triton": triton.why_not_conv(weight.shape[1])}
    if x.is_cuda:
        refusals["cuda"] = cuda.why_not_conv_update(causal_conv1d_package.why_not_update(x, conv_state, weight))
    name = backends.choose(op, x.device, x.dtype, backend, refusals)
    return update(*args, name)

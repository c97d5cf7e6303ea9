"""The causal depthwise convolution in front of the selective scan."""

from difflib import get_close_matches

from torch import Tensor

from ssmtune.ops import arguments, backends
from ssmtune.ops.causal_conv1d_op import causal_conv1d_fwd

_OPTIONAL = frozenset({"bias", "initial_states"})
_ACTIVATIONS = ("silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own causal filter.

        out_t[d] = bias[d] + sum_k weight[d, k] x_{t - width + 1 + k}[d]          [then silu]

    Steps before the first are those of `initial_states`, or zero. Channels-last memory is taken without a copy and
    gives a channels-last result. The arguments are those of `causal_conv1d_fn` in
    https://github.com/Dao-AILab/causal-conv1d.

    Args:
        x: (batch, dim, seqlen). In float32, bfloat16 or float16; float64 runs on the reference.
        weight: (dim, width).
        bias: (dim,).
        initial_states: (batch, dim, width - 1). The steps before x, oldest first; differentiable.
        activation: None, or "silu" (also called "swish").
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, dim, seqlen) in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one.
        ValueError: a wrong shape, different devices, an empty batch or sequence, or an unknown activation or backend.
        RuntimeError: the backend asked for cannot run the call.
    """
    op = "causal_conv1d"
    if activation is not None and activation not in _ACTIVATIONS:
        nearest = get_close_matches(str(activation), _ACTIVATIONS, n=1)
        raise ValueError(
            f"{op}: there is no activation {activation!r}{f'; did you mean {nearest[0]!r}?' if nearest else '.'}\n"
            f"  The convolution can end in silu or nothing. Pass activation=None and apply another one to the result."
        )
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
    arguments.check_tensors(op, "x", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "x", x, ("batch", "dim", "seqlen"))
    arguments.check_dimensions(op, "weight", weight, ("dim", "width"))
    sizes = {"batch": x.shape[0], "dim": x.shape[1], "width": weight.shape[1], "width - 1": weight.shape[1] - 1}
    arguments.check_shape(op, "weight", weight, (("dim", "width"),), sizes, "dim is that of x.")
    arguments.check_shape(op, "bias", bias, (("dim",),), sizes, "dim is that of x.")
    why = "batch and dim are those of x, width is that of weight."
    arguments.check_shape(op, "initial_states", initial_states, (("batch", "dim", "width - 1"),), sizes, why)

    name = backends.choose(op, x.device, x.dtype, backend)
    return causal_conv1d_fwd(*tensors.values(), activation is not None, name)

"""The causal depthwise convolution in front of the selective scan."""

from difflib import get_close_matches

from torch import Tensor

from ssmtune.ops import arguments, backends, causal_conv1d_package, cuda, triton
from ssmtune.ops.causal_conv1d_op import causal_conv1d_fwd
from ssmtune.ops.packing import check_cu_seqlens

_OPTIONAL = frozenset({"bias", "initial_states"})
_ACTIVATIONS = ("silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal filter.

        out_t[d] = bias[d] + sum_k weight[d, k] x_{t - width + 1 + k}[d]          [then silu]

    Steps before the first are those of `initial_states`, or zero. Channels-last memory is taken without a copy and
    gives a channels-last result. The arguments are those of `causal_conv1d_fn` in
    https://github.com/Dao-AILab/causal-conv1d.

    Args:
        x: (batch, dim, seqlen). In float32, bfloat16 or float16; float64 runs on the reference.
        weight: (dim, width).
        bias: (dim,).
        initial_states: (batch, dim, width - 1), or (n_sequences, dim, width - 1) with `cu_seqlens`. The steps before x,
            oldest first; differentiable.
        return_final_states: whether to return the last width - 1 steps too, to go on from; they are differentiable.
        activation: None, or "silu" (also called "swish").
        cu_seqlens: (n_sequences + 1,) in int32 or int64. x is then one row (batch 1) of sequences packed one after the
            other, and these are where each one starts and, last, where the last one ends: [0, 5, 12].
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, dim, seqlen) in the dtype of x. With `return_final_states` the tuple of out and final_states, of the
        shape of initial_states and in the dtype of x: oldest first, and continued to the left by initial_states, or by
        zeros, where a sequence is shorter than width - 1.

    Raises:
        TypeError: an argument is not a tensor, or not of the right kind.
        ValueError: a wrong shape, different devices, an empty batch or sequence, values of cu_seqlens that do not cut
            up seqlen, or an unknown activation or backend.
        RuntimeError: the backend asked for cannot run the call.
    """
    op = "causal_conv1d"
    check_activation(op, activation)
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
    arguments.check_tensors(op, "x", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "x", x, ("batch", "dim", "seqlen"))
    arguments.check_dimensions(op, "weight", weight, ("dim", "width"))
    batch, dim, seqlen = x.shape
    sizes = {"batch": batch, "dim": dim, "width": weight.shape[1], "width - 1": weight.shape[1] - 1}
    rows = "batch"
    if cu_seqlens is not None:
        check_cu_seqlens(op, "x", cu_seqlens, batch, seqlen, x.device)
        rows, sizes["n_sequences"] = "n_sequences", cu_seqlens.shape[0] - 1
    arguments.check_shape(op, "weight", weight, (("dim", "width"),), sizes, "dim is that of x.")
    arguments.check_shape(op, "bias", bias, (("dim",),), sizes, "dim is that of x.")
    why = "batch and dim are those of x, width is that of weight, n_sequences that of cu_seqlens."
    arguments.check_shape(op, "initial_states", initial_states, ((rows, "dim", "width - 1"),), sizes, why)

    final = bool(return_final_states)
    refusals, packaged = {"triton": triton.why_not_conv(weight.shape[1])}, False
    if x.is_cuda:
        why_not_packaged = causal_conv1d_package.why_not(x, weight, initial_states, final, cu_seqlens)
        packaged = why_not_packaged is None
        refusals["cuda"] = cuda.why_not_conv(why_not_packaged, weight.shape[1])
    name = backends.choose(op, x.device, x.dtype, backend, refusals)
    if name == "cuda" and packaged:
        return causal_conv1d_package.causal_conv1d(*tensors.values(), cu_seqlens, activation is not None, final)
    out, final_states = causal_conv1d_fwd(*tensors.values(), cu_seqlens, activation is not None, final, name)
    return (out, final_states) if final else out


def check_activation(op: str, activation: str | None) -> None:
    """Check that the activation is None or a name of SiLU."""
    if activation is None or activation in _ACTIVATIONS:
        return
    nearest = get_close_matches(str(activation), _ACTIVATIONS, n=1)
    raise ValueError(
        f"{op}: there is no activation {activation!r}{f'; did you mean {nearest[0]!r}?' if nearest else '.'}\n"
        "  The convolution can end in silu or nothing. Pass activation=None and apply another one to the result."
    )

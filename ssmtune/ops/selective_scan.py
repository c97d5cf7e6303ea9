"""The selective scan of Mamba with a trainable initial state and trainable offsets."""

import torch
from torch import Tensor

from ssmtune.ops import arguments, backends, packing
from ssmtune.ops.selective_scan_op import needs_scan, selective_scan_fwd

_AXES = ("batch", "dim", "seqlen")
_OPTIONAL = frozenset({"D", "z", "delta_bias", "initial_state", "state_offset", "output_offset"})
_LAYOUTS = {
    "delta": (_AXES,),
    "z": (_AXES,),
    "D": (("dim",),),
    "delta_bias": (("dim",),),
}
_LAYOUTS_OF_ROWS = {
    rows: {
        "initial_state": (("dim", "dstate"), (rows, "dim", "dstate")),
        "state_offset": (("dim", "dstate"), (rows, "dim", "dstate")),
        "output_offset": (("dim",), (rows, "dim")),
    }
    for rows in ("batch", "n_sequences")
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba from an initial state, reading it through an offset.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t                  h_0 = initial_state
        y_t = C_t (h_t + state_offset) + D u_t + output_offset          [* silu(z_t)]

    The offset is read and never carried to the next step. The first ten arguments are those of `mamba_ssm`'s
    `selective_scan_fn`. Channels-last memory, a transposed view of (batch, seqlen, dim), is taken without a copy and
    gives a channels-last result. The recurrence is that of Mamba (https://arxiv.org/abs/2312.00752), the state offset
    that of State-offset Tuning (https://arxiv.org/abs/2503.03499).

    Args:
        u: (batch, dim, seqlen). The input, in float32, bfloat16 or float16; float64 runs on the reference.
        delta: (batch, dim, seqlen). The step, before `delta_bias` and softplus.
        A: (dim, dstate). Negative.
        B: (batch, dstate, seqlen), or (batch, groups, dstate, seqlen): channel d reads group d // (dim / groups).
        C: (batch, dstate, seqlen), or (batch, groups, dstate, seqlen) with the groups of B.
        D: (dim,).
        z: (batch, dim, seqlen). The gate.
        delta_bias: (dim,). Added to delta.
        delta_softplus: whether to take the softplus of delta.
        return_last_state: whether to return the state after the last step too; it is differentiable.
        initial_state: (dim, dstate) shared by all rows, or (batch, dim, dstate).
        state_offset: (dim, dstate) shared by all rows, or (batch, dim, dstate).
        output_offset: (dim,) shared by all rows, or (batch, dim).
        cu_seqlens: (n_sequences + 1,) in int32 or int64. Packs sequences one after the other along seqlen, in a batch
            of 1: [0, 5, 12] are sequences of 5 and of 7 steps, each from its own initial state. Where this page says
            batch, initial_state, state_offset, output_offset and last_state then have n_sequences. Its values are
            checked on the CPU, and by the reference anywhere; a kernel on a GPU would have to wait for them at every
            call, so there the caller vouches for them.
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, dim, seqlen) in the dtype of u. With `return_last_state` the tuple of out and last_state
        (batch, dim, dstate) in float32.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one (`cu_seqlens`: int32 or int64).
        ValueError: a wrong shape, different devices, an empty batch or sequence, `cu_seqlens` that do not cut seqlen
            into sequences or come with a batch other than 1, or an unknown backend.
        RuntimeError: the backend asked for cannot run the call.
    """
    op = "selective_scan"
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
        "state_offset": state_offset,
        "output_offset": output_offset,
    }
    arguments.check_tensors(op, "u", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "u", u, _AXES)
    arguments.check_dimensions(op, "A", A, ("dim", "dstate"))
    batch, dim, seqlen = u.shape
    sizes = {"batch": batch, "dim": dim, "seqlen": seqlen, "dstate": A.shape[1]}
    arguments.check_shape(op, "A", A, (("dim", "dstate"),), sizes, "dim is that of u.")
    for name, layouts in _LAYOUTS.items():
        why = "batch, dim and seqlen are those of u, dstate is that of A."
        arguments.check_shape(op, name, tensors[name], layouts, sizes, why)
    why = "batch and seqlen are those of u, dstate is that of A."
    arguments.check_groups(op, B, C, ("batch", "dstate", "seqlen"), sizes, why)
    rows, why = "batch", "batch and dim are those of u, dstate is that of A."
    if cu_seqlens is not None:
        packing.check_cu_seqlens(op, "u", cu_seqlens, batch, seqlen, u.device)
        rows, why = "n_sequences", "cu_seqlens holds one value more than there are sequences."
        sizes[rows] = cu_seqlens.shape[0] - 1
    for name, layouts in _LAYOUTS_OF_ROWS[rows].items():
        arguments.check_shape(op, name, tensors[name], layouts, sizes, why)

    name = backends.choose(op, u.device, u.dtype, backend)
    keep_states = False
    if torch.is_grad_enabled():
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors.values()]
        keep_states = needs_scan(tensors.values(), wanted, cu_seqlens)
    out, last_state, _ = selective_scan_fwd(*tensors.values(), cu_seqlens, delta_softplus, keep_states, name)
    return (out, last_state) if return_last_state else out

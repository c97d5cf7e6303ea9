"""The scan of Mamba-2 with trainable initial states and trainable offsets."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmtune.ops import arguments, backends, packing
from ssmtune.ops.reference import compute_dtype
from ssmtune.ops.ssd_scan_op import needs_scan, ssd_scan_fwd

_AXES = ("batch", "seqlen", "nheads", "headdim")
_STATE = ("nheads", "headdim", "dstate")
_OPTIONAL = frozenset({"D", "z", "dt_bias", "initial_states", "state_offset", "output_offset"})
_LAYOUTS = {
    "dt": (("batch", "seqlen", "nheads"),),
    "A": (("nheads",),),
    "B": (("batch", "seqlen", "ngroups", "dstate"),),
    "C": (("batch", "seqlen", "ngroups", "dstate"),),
    "D": (("nheads",), ("nheads", "headdim")),
    "z": (_AXES,),
    "dt_bias": (("nheads",),),
}
_LAYOUTS_OF_ROWS = {
    rows: {
        "initial_states": (_STATE, (rows, *_STATE)),
        "state_offset": (_STATE, (rows, *_STATE)),
        "output_offset": (("nheads", "headdim"), (rows, "nheads", "headdim")),
    }
    for rows in ("batch", "n_sequences")
}


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2 from initial states, reading them through an offset.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T                       h_0 = initial_states
        y_t = (h_t + state_offset) C_t + D x_t + output_offset           [* silu(z_t)]

    One decay A and one step dt serve a whole head. The offset is read and never carried to the next step. Arguments
    have the names and shapes of `mamba_ssm`'s `mamba_chunk_scan_combined`, without `chunk_size`, on which no result
    depends. The recurrence is that of Mamba-2 (https://arxiv.org/abs/2405.21060), the state offset that of State-offset
    Tuning (https://arxiv.org/abs/2503.03499).

    Args:
        x: (batch, seqlen, nheads, headdim). The input, in float32, bfloat16 or float16; float64 runs on the reference.
        dt: (batch, seqlen, nheads). The step, before `dt_bias`, softplus and `dt_limit`.
        A: (nheads,). Negative.
        B: (batch, seqlen, ngroups, dstate): head h reads group h // (nheads / ngroups).
        C: (batch, seqlen, ngroups, dstate).
        D: (nheads,) or (nheads, headdim).
        z: (batch, seqlen, nheads, headdim). The gate.
        dt_bias: (nheads,). Added to dt.
        initial_states: (nheads, headdim, dstate) shared by all rows, or (batch, nheads, headdim, dstate).
        dt_softplus: whether to take the softplus of dt.
        dt_limit: the least and the largest step; what lies beyond is cut off, after the softplus.
        return_final_states: whether to return the states after the last step too; they are differentiable.
        state_offset: (nheads, headdim, dstate) shared by all rows, or (batch, nheads, headdim, dstate).
        output_offset: (nheads, headdim) shared by all rows, or (batch, nheads, headdim).
        cu_seqlens: (n_sequences + 1,) in int32 or int64. Packs sequences one after the other along seqlen, as in
            `ssmtune.selective_scan`; initial_states, state_offset, output_offset and the final states then have
            n_sequences where this page says batch.
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, seqlen, nheads, headdim) in the dtype of x. With `return_final_states` the tuple of out and the
        final states (batch, nheads, headdim, dstate) in float32.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one (`cu_seqlens`: int32 or int64).
        ValueError: a wrong shape, different devices, an empty batch or sequence, groups that do not divide the heads,
            limits out of order, `cu_seqlens` that do not cut seqlen into sequences, or an unknown backend.
        RuntimeError: the backend asked for cannot run the call.
    """
    op = "ssd_scan"
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    tensors |= {"initial_states": initial_states, "state_offset": state_offset, "output_offset": output_offset}
    arguments.check_tensors(op, "x", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "x", x, _AXES)
    arguments.check_dimensions(op, "B", B, _LAYOUTS["B"][0])
    sizes = dict(zip(_AXES, x.shape, strict=True)) | {"ngroups": B.shape[2], "dstate": B.shape[3]}
    _check_groups_and_limits(op, sizes, dt_limit)
    for name, layouts in _LAYOUTS.items():
        why = "batch, seqlen, nheads and headdim are those of x, ngroups and dstate those of B."
        arguments.check_shape(op, name, tensors[name], layouts, sizes, why)
    rows, why = "batch", "batch, nheads and headdim are those of x, dstate is that of B."
    if cu_seqlens is not None:
        packing.check_cu_seqlens(op, "x", cu_seqlens, sizes["batch"], sizes["seqlen"], x.device)
        rows, why = "n_sequences", "cu_seqlens holds one value more than there are sequences."
        sizes[rows] = cu_seqlens.shape[0] - 1
    for name, layouts in _LAYOUTS_OF_ROWS[rows].items():
        arguments.check_shape(op, name, tensors[name], layouts, sizes, why)

    name = backends.choose(op, x.device, x.dtype, backend)
    del tensors["z"]
    if D is not None and D.dim() == 1:
        tensors["D"] = D[:, None].expand(-1, sizes["headdim"])
    keep_states = False
    if torch.is_grad_enabled():
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors.values()]
        keep_states = needs_scan(tensors.values(), wanted, cu_seqlens)
    limits = float(dt_limit[0]), float(dt_limit[1])
    out, final_states, _ = ssd_scan_fwd(*tensors.values(), cu_seqlens, dt_softplus, *limits, keep_states, name)
    if z is not None:
        wide = compute_dtype(x)
        out = (out.to(wide) * F.silu(z.to(wide))).to(x.dtype)
    return (out, final_states) if return_final_states else out


def _check_groups_and_limits(op: str, sizes: dict[str, int], dt_limit: tuple[float, float]) -> None:
    if sizes["nheads"] % sizes["ngroups"]:
        raise ValueError(
            f"{op}: B has {sizes['ngroups']} groups for {sizes['nheads']} heads, expected a divisor of the heads.\n"
            "  Each group is read by as many heads as the next. Take as many groups as the model has."
        )
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(
            f"{op}: dt_limit is {tuple(dt_limit)}, expected 0 <= least <= largest.\n"
            "  Steps are cut off at both. Pass (0.0, math.inf) for no limit."
        )

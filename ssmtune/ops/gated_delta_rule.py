"""The gated delta rule with trainable initial states and trainable offsets."""

from itertools import pairwise

import torch
from torch import Tensor

from ssmtune.ops import arguments, packing
from ssmtune.ops.delta_chunks import add_offsets, scan_chunks
from ssmtune.ops.reference import cast, compute_dtype

_AXES = ("batch", "seqlen", "nheads", "vdim")
_KEYS = ("batch", "seqlen", "nkeyheads", "kdim")
_STATE = ("nheads", "kdim", "vdim")
_OPTIONAL = frozenset({"initial_state", "state_offset", "output_offset"})
_EPS = 1e-6


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the gated delta rule from an initial state, reading it through an offset.

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T            S_0 = initial_state
        o_t = scale (S_t + state_offset)^T q_t + output_offset

    The offset is read and never carried to the next step. The first arguments are those of `chunk_gated_delta_rule`
    and `chunk_kda` of the package fla. Steps are taken a chunk at a time as products of matrices, in PyTorch on every
    device and in float32 or wider, also under autocast; autograd gives the gradients. The rule is that of Gated
    DeltaNet (https://arxiv.org/abs/2412.06464), with a decay for each key channel that of Kimi Linear
    (https://arxiv.org/abs/2510.26692), the state offset that of State-offset Tuning (https://arxiv.org/abs/2503.03499).

    Args:
        q: (batch, seqlen, nkeyheads, kdim). The queries, by which the state is read.
        k: (batch, seqlen, nkeyheads, kdim). The keys: head h has those of key head h // (nheads / nkeyheads).
        v: (batch, seqlen, nheads, vdim). The values, in float32, bfloat16, float16 or float64.
        g: (batch, seqlen, nheads), or (batch, seqlen, nheads, kdim). Logarithms of decays, at most zero.
        beta: (batch, seqlen, nheads). How far a step moves what the state holds at its key towards its value.
        scale: of the queries, 1 / sqrt(kdim) by default.
        initial_state: (nheads, kdim, vdim) shared by all rows, or (batch, nheads, kdim, vdim).
        output_final_state: whether to return the states after the last step too; they are differentiable.
        use_qk_l2norm_in_kernel: whether to make queries and keys of length one first.
        state_offset: (nheads, kdim, vdim) shared by all rows, or (batch, nheads, kdim, vdim).
        output_offset: (nheads, vdim) shared by all rows, or (batch, nheads, vdim).
        cu_seqlens: (n_sequences + 1,) in int32 or int64. Packs sequences one after the other along seqlen, as in
            `ssmtune.selective_scan`; initial_state, the offsets and the final states then have n_sequences where this
            page says batch. Its values are read, for which a GPU is waited for.

    Returns:
        o (batch, seqlen, nheads, vdim) in the dtype of v. With `output_final_state` the tuple of o and the final
        states (batch, nheads, kdim, vdim) in float32.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one (`cu_seqlens`: int32 or int64).
        ValueError: a wrong shape, different devices, an empty batch or sequence, key heads that do not divide the
            heads, or `cu_seqlens` that do not cut seqlen into sequences.
    """
    op = "gated_delta_rule"
    tensors = {"v": v, "q": q, "k": k, "g": g, "beta": beta, "initial_state": initial_state}
    tensors |= {"state_offset": state_offset, "output_offset": output_offset}
    arguments.check_tensors(op, "v", tensors, _OPTIONAL)
    arguments.check_dimensions(op, "v", v, _AXES)
    arguments.check_dimensions(op, "k", k, _KEYS)
    sizes = dict(zip(_AXES, v.shape, strict=True)) | {"nkeyheads": k.shape[2], "kdim": k.shape[3]}
    if sizes["nheads"] % sizes["nkeyheads"]:
        raise ValueError(
            f"{op}: k has {sizes['nkeyheads']} heads for {sizes['nheads']} heads of v, expected a divisor of them.\n"
            "  Each key head serves as many heads as the next. Take as many key heads as the model has."
        )
    rows, bounds = "batch", [0, sizes["seqlen"]]
    if cu_seqlens is not None:
        packing.check_cu_seqlens(op, "v", cu_seqlens, sizes["batch"], sizes["seqlen"], v.device)
        bounds = packing.sequence_bounds(op, cu_seqlens, sizes["seqlen"])
        rows = "n_sequences"
        sizes[rows] = len(bounds) - 1
    heads = ("batch", "seqlen", "nheads")
    layouts = {"q": (_KEYS,), "k": (_KEYS,), "g": (heads, (*heads, "kdim")), "beta": (heads,)}
    layouts |= dict.fromkeys(("initial_state", "state_offset"), (_STATE, (rows, *_STATE)))
    layouts["output_offset"] = (("nheads", "vdim"), (rows, "nheads", "vdim"))
    why = "batch, seqlen, nheads and vdim are those of v, nkeyheads and kdim those of k."
    for name, known in layouts.items():
        arguments.check_shape(op, name, tensors[name], known, sizes, why)

    n_rows, group = sizes[rows], sizes["nheads"] // sizes["nkeyheads"]
    lengths = [end - start for start, end in pairwise(bounds)]
    dtype = v.dtype
    # Autocast would round the state to its dtype.
    with torch.autocast(v.device.type, enabled=False):
        v, q, k, g, beta, initial_state, state_offset, output_offset = cast(compute_dtype(v), *tensors.values())
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
        q = q * (sizes["kdim"] ** -0.5 if scale is None else scale)
        q, k = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q, k))
        g = g.unsqueeze(-1) if g.dim() == 3 else g
        if initial_state is None:
            initial_state = v.new_zeros(sizes["nheads"], sizes["kdim"], sizes["vdim"])
        initial_state = initial_state.expand(n_rows, -1, -1, -1)
        out, final_state = scan_chunks(q, k, v, g, beta.unsqueeze(-1), initial_state, lengths)
        out = add_offsets(out, q, state_offset, output_offset, lengths).to(dtype)
    return (out, final_state) if output_final_state else out

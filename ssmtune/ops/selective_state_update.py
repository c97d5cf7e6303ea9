"""One decoding step of the selective scan."""

from torch import Tensor

from ssmtune.ops import adapters, arguments, backends
from ssmtune.ops.decoding import call_directly, check_overwritten
from ssmtune.ops.heads import join_heads
from ssmtune.ops.selective_state_update_op import selective_state_update as update

_OPTIONAL = frozenset({"D", "z", "dt_bias", "state_offset", "output_offset"})
_CHANNELS, _HEADS = ("dim",), ("nheads", "headdim")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
    adapter_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance the state of the selective scan by one step, in place.

        state <- exp(dt A) state + dt B x
        out    = C (state + state_offset) + D x + output_offset          [* silu(z)]

    The offset is read and never enters the state. The first ten arguments are those of `mamba_ssm`'s function of the
    same name. As there they may have heads, those of Mamba-2: each `dim` below is then two axes, (nheads, headdim), and
    what the channels of a head share comes as an expanded view. There is no gradient.

    Args:
        state: (batch, dim, dstate). Overwritten with the next state; float32 is updated without a copy.
        x: (batch, dim). The input, in float32, bfloat16 or float16; float64 runs on the reference.
        dt: (batch, dim). The step, before `dt_bias` and softplus.
        A: (dim, dstate). Negative. Of a view that is expanded along dstate, as Mamba-2's is, the CPU takes one
            exponential per channel.
        B: (batch, dstate), or (batch, groups, dstate): each of the groups, which divide dim (with heads nheads), serves
            as many channels.
        C: (batch, dstate), or (batch, groups, dstate) with the groups of B.
        D: (dim,).
        z: (batch, dim). The gate.
        dt_bias: (dim,). Added to dt.
        dt_softplus: whether to take the softplus of dt.
        state_offset: (dim, dstate) shared by the batch, or (batch, dim, dstate); with `adapter_index` (n_adapters,
            dim, dstate).
        output_offset: (dim,) shared by the batch, or (batch, dim); with `adapter_index` (n_adapters, dim).
        adapter_index: (batch,) in int32 or int64. The offsets are then stacks, of which row b reads the entry
            adapter_index[b]; -1 stands for no offset. The stacks are float32 with contiguous entries, so that no call
            copies them. Values are checked on the CPU; a GPU would have to be waited for, and one out of range there
            reads no offset.
        backend: "cuda", "triton", "cpu" or "reference" to run there or fail, "auto" to choose. By default what
            `ssmtune.backend` or SSMTUNE_BACKEND says, else "auto".

    Returns:
        out (batch, dim) in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or not a real floating-point one (`adapter_index`: int32 or int64).
        ValueError: a wrong shape, different devices, an empty batch, an expanded state, groups that do not divide dim,
            an `adapter_index` out of range or without offsets, or an unknown backend.
        RuntimeError: a tensor requires a gradient while gradients are recorded, or the backend asked for cannot run
            the call.
    """
    op = "selective_state_update"
    by_heads = isinstance(state, Tensor) and state.dim() == 4
    args = state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), state_offset, output_offset, adapter_index
    if not by_heads and (out := call_directly(op, x, backend, args)) is not None:
        return out
    tensors = {
        "state": state,
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "state_offset": state_offset,
        "output_offset": output_offset,
    }
    arguments.check_tensors(op, "state", tensors, _OPTIONAL)
    axes = _HEADS if by_heads else _CHANNELS
    of_state = ("batch", *axes, "dstate")
    arguments.check_dimensions(op, "state", state, of_state)
    sizes = dict(zip(of_state, state.shape, strict=True))
    why = f"{', '.join(of_state[:-1])} and dstate are those of state."
    for name in ("x", "dt", "z"):
        arguments.check_shape(op, name, tensors[name], (("batch", *axes),), sizes, why)
    for name in ("D", "dt_bias"):
        arguments.check_shape(op, name, tensors[name], (axes,), sizes, why)
    arguments.check_shape(op, "A", A, ((*axes, "dstate"),), sizes, why)
    arguments.check_groups(op, B, C, ("batch", "dstate"), sizes, why, axes[0])
    if adapter_index is not None:
        adapters.check_adapters(op, "state", adapter_index, tensors, axes, sizes)
    else:
        arguments.check_shape(op, "state_offset", state_offset, ((*axes, "dstate"), of_state), sizes, why)
        arguments.check_shape(op, "output_offset", output_offset, (axes, ("batch", *axes)), sizes, why)
    instead = "selective_scan on a sequence of length 1\n  with initial_state=state and return_last_state=True"
    check_overwritten(op, "state", tensors, instead)

    name = backends.choose(op, x.device, x.dtype, backend)
    if not by_heads:
        return update(*args, name)
    flat = join_heads(*args)
    out = call_directly(op, x, backend, flat) if name == "cpu" else None
    if out is None:
        out = update(*flat, name)
    if state.stride(1) != state.shape[2] * state.stride(2):
        # in such memory heads cannot be joined without a copy, and that was advanced
        state.copy_(flat[0].view_as(state))
    return out.view_as(x)

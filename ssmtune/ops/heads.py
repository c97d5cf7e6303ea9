"""The heads of Mamba-2 as channels of the selective scan: dim = nheads * headdim."""

from torch import Tensor


def join_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    adapter_index: Tensor | None,
) -> tuple:
    """The arguments of a step by channels; those of contiguous memory are views.

    What a head shares is written out for its channels, but not for their states.
    """
    if A.stride(-1) == 0:
        A = A[..., 0].flatten().unsqueeze(1).expand(-1, A.shape[-1])
    else:
        A = A.flatten(0, 1)
    return (
        state.flatten(1, 2),
        x.flatten(1),
        dt.flatten(1),
        A,
        B,
        C,
        None if D is None else D.flatten(),
        None if z is None else z.flatten(1),
        None if dt_bias is None else dt_bias.flatten(),
        dt_softplus,
        None if state_offset is None else state_offset.flatten(-3, -2),
        None if output_offset is None else output_offset.flatten(-2),
        adapter_index,
    )

"""Calls into the Triton kernels: the decoding step on a GPU, or in Triton's interpreter on the CPU."""

import torch
from torch import Tensor


def selective_state_update(
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
    out: Tensor,
) -> None:
    """Advance the state by one step."""
    from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd

    def parameter(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(torch.float32).contiguous()

    def activation(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(x.dtype).contiguous()

    work = parameter(state)
    selective_state_update_fwd(
        work,
        activation(x),
        activation(dt),
        parameter(A),
        activation(B),
        activation(C),
        parameter(D),
        activation(z),
        parameter(dt_bias),
        dt_softplus,
        parameter(state_offset),
        parameter(output_offset),
        out,
    )
    if work is not state:
        state.copy_(work)

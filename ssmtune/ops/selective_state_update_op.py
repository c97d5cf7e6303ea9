"""torch.ops.ssmtune.selective_state_update: schema, shapes for tracing, and the call of a backend."""

import torch
from torch import Tensor

from ssmtune.ops.adapters import check_values
from ssmtune.ops.backends import implementation
from ssmtune.ops.layout import contiguous
from ssmtune.ops.reference import compute_dtype

torch.library.define(
    "ssmtune::selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_offset, Tensor? output_offset, Tensor? adapter_index, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::selective_state_update")
def _fake(state, x, *args) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("ssmtune::selective_state_update", "CompositeExplicitAutograd")
def _update(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_offset, output_offset, adapter_index, backend
) -> Tensor:
    if adapter_index is None:
        state_offset, output_offset = (contiguous(offset, compute_dtype(x)) for offset in (state_offset, output_offset))
    else:
        check_values("selective_state_update", adapter_index, state_offset, output_offset)
    dtype, wide = x.dtype, compute_dtype(x)
    work = contiguous(state, wide)
    out = implementation(backend).selective_state_update(
        work,
        contiguous(x, dtype),
        contiguous(dt, dtype),
        # of states that decay alike the CPU kernel takes one exponential, which it sees by their stride
        A if backend == "cpu" else contiguous(A, wide),
        contiguous(B, dtype),
        contiguous(C, dtype),
        contiguous(D, wide),
        contiguous(z, dtype),
        contiguous(dt_bias, wide),
        dt_softplus,
        state_offset,
        output_offset,
        None if adapter_index is None else adapter_index.contiguous(),
    )
    if work is not state:
        state.copy_(work)
    return out


selective_state_update = torch.ops.ssmtune.selective_state_update.default

"""torch.ops.ssmtune.selective_state_update: schema, shapes for tracing, and the call of a backend."""

import torch
from torch import Tensor

from ssmtune.ops.backends import implementation

torch.library.define(
    "ssmtune::selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_offset, Tensor? output_offset, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::selective_state_update")
def _fake(state, x, *args) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("ssmtune::selective_state_update", "CompositeExplicitAutograd")
def _update(state, x, *args) -> Tensor:
    *args, backend = args
    out = x.new_empty(x.shape)
    implementation(backend).selective_state_update(state, x, *args, out)
    return out


selective_state_update = torch.ops.ssmtune.selective_state_update.default

"""torch.ops.ssmtune.causal_conv1d_update: schema, shapes for tracing, and the call of a backend."""

import torch
from torch import Tensor

from ssmtune.ops.backends import implementation

torch.library.define(
    "ssmtune::causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("ssmtune::causal_conv1d_update")
def _fake(x, *args) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("ssmtune::causal_conv1d_update", "CompositeExplicitAutograd")
def _update(x, conv_state, weight, bias, silu, backend) -> Tensor:
    return implementation(backend).causal_conv1d_update(x, conv_state, weight, bias, silu)


causal_conv1d_update = torch.ops.ssmtune.causal_conv1d_update.default

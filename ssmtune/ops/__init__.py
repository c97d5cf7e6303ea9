"""The operators: the selective scan, the convolution in front of it, and one decoding step of each."""

from ssmtune import native
from ssmtune.ops.backends import available_backends, backend
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.causal_conv1d_update import causal_conv1d_update
from ssmtune.ops.selective_scan import selective_scan
from ssmtune.ops.selective_state_update import selective_state_update

native.load()

__all__ = [
    "available_backends",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_scan",
    "selective_state_update",
]

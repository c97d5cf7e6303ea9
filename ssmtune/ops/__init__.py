"""The operators: the scans of Mamba and Mamba-2, the gated delta rule, convolutions, and decoding steps."""

from ssmtune import native
from ssmtune.ops.adapters import gather_rows
from ssmtune.ops.backends import available_backends, backend
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.causal_conv1d_update import causal_conv1d_update
from ssmtune.ops.gated_delta_rule import gated_delta_rule
from ssmtune.ops.selective_scan import selective_scan
from ssmtune.ops.selective_state_update import selective_state_update
from ssmtune.ops.ssd_scan import ssd_scan

native.load()

__all__ = [
    "available_backends",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_delta_rule",
    "gather_rows",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
]

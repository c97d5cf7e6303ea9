"""What runs Mamba-2's scan on each backend."""

from ssmtune.ops.backends import implementation
from ssmtune.ops.ssd_scan_expanded import ExpandedScan


def ssd_backend(name: str) -> ExpandedScan:
    """Return the implementation of a backend: kernels for this scan, else those of the selective scan."""
    return ExpandedScan(implementation(name))

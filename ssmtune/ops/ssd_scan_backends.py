"""What runs Mamba-2's scan on each backend."""

from types import ModuleType

from ssmtune.ops import ssd_scan_cpu, ssd_scan_triton
from ssmtune.ops.backends import implementation
from ssmtune.ops.ssd_scan_expanded import ExpandedScan

_KERNELS = {"cpu": ssd_scan_cpu, "triton": ssd_scan_triton}


def ssd_backend(name: str) -> ModuleType | ExpandedScan:
    """Return the implementation of a backend: kernels for this scan, else those of the selective scan."""
    return _KERNELS.get(name) or ExpandedScan(implementation(name))

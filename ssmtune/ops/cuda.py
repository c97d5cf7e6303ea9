"""Calls into the CUDA kernels.

They are operators of the same names as those for the CPU, and torch calls the one for the device that the tensors are
on: only what depends on how a kernel works is said here.
"""

from torch import Tensor

from ssmtune.ops import backends, causal_conv1d_package, cpu
from ssmtune.ops.cpu import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    selective_scan_backward,
    selective_scan_forward,
    selective_state_update,
)
from ssmtune.ops.packing import n_kept_states

__all__ = [
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv1d_update",
    "chunk_states_shape",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_state_update",
    "why_not_conv",
    "why_not_conv_update",
]

CHUNK_SIZE = 32
MAX_WIDTH = 4


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the state between chunks for the backward scan."""
    return batch * n_kept_states(seqlen, n_sequences, CHUNK_SIZE), dim, dstate


def why_not_conv(why_not_packaged: str | None, width: int) -> str | None:
    """Give None when the package causal_conv1d or these kernels convolve a sequence, or why neither does."""
    return why_not_packaged and _join(why_not_packaged, _why_not_width(width))


def why_not_conv_update(why_not_packaged: str | None) -> str | None:
    """Give None when the package causal_conv1d or these kernels take a single step, or why neither does."""
    return why_not_packaged and _join(why_not_packaged, backends.why_not_cuda_kernels())


def _why_not_width(width: int) -> str | None:
    reason = None if width <= MAX_WIDTH else f"the CUDA kernels take filters of width {MAX_WIDTH} at most, got {width}"
    return backends.why_not_cuda_kernels() or reason


def _join(why_not_packaged: str, why_not_kernels: str | None) -> str | None:
    return why_not_kernels and f"{why_not_packaged}; {why_not_kernels}"


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Advance the state of the convolution by one step."""
    packaged = causal_conv1d_package.why_not_update(x, conv_state, weight) is None
    return (causal_conv1d_package if packaged else cpu).causal_conv1d_update(x, conv_state, weight, bias, silu)

"""Calls into the CUDA kernels.

They are operators of the same names as those for the CPU, and torch calls the one for the device that the tensors are
on: only what depends on how a kernel works is said here.
"""

from ssmtune.ops.cpu import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv1d_update,
    selective_scan_backward,
    selective_scan_forward,
    selective_state_update,
)

__all__ = [
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv1d_update",
    "chunk_states_shape",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_state_update",
]

CHUNK_SIZE = 32


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the state between chunks for the backward scan."""
    # n steps have (n - 1) // CHUNK_SIZE states between chunks, and several sequences together at most this many
    n_chunks = (seqlen - (1 if n_sequences is None else n_sequences)) // CHUNK_SIZE
    return batch * n_chunks, dim, dstate

"""Memory layouts of (batch, dim, seqlen) tensors.

Channels-last is what projections produce, a transposed view of (batch, seqlen, dim); channels-first is what
convolutions use. Kernels take both, and each result gets the layout of the argument it belongs to.
"""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Say whether neighbouring channels, rather than neighbouring steps, are neighbours in memory."""
    return x.stride(1) == 1 and x.stride(2) != 1


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a dense (batch, dim, seqlen) tensor in the layout of `x`."""
    batch, dim, seqlen = x.shape
    if is_channels_last(x):
        return x.new_empty(batch, seqlen, dim, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, dim, seqlen, dtype=dtype)


def dense_axis(x: Tensor) -> Tensor:
    """Return `x` itself, or failing that a copy, with a stride of exactly 1 along one of its last two axes."""
    if x.stride(-2) == 1 or x.stride(-1) == 1:
        return x
    # the stride of an axis of size 1 is arbitrary, and contiguous() need not repair it
    if x.size(-1) == 1:
        return x.as_strided(x.shape, (*x.stride()[:-1], 1))
    return x.contiguous()


def contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `x` itself where it is contiguous and of that dtype already, else a copy that is; None for None."""
    if x is None:
        return None
    # asking first is ten times as fast as a cast that does nothing, which counts in decoding
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()

"""Calls into the Triton kernels of Mamba-2's scan: on a GPU, or in Triton's interpreter on the CPU.

The kernels are imported by the functions that launch them, for triton takes a second to load.
"""

import torch
from torch import Tensor

from ssmtune.ops.kernel_inputs import dense_heads, parameter, ssd_inputs


def chunk_states_shape(x_shape: tuple[int, ...], groups: int, dstate: int, n_sequences: int | None) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the states before chunks for the backward scan."""
    from ssmtune.triton_kernels.ssd_scan_launches import n_chunks

    batch, seqlen, heads, headdim = x_shape
    return n_chunks(batch, seqlen, n_sequences), heads, headdim, dstate


def forward(
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    *results: Tensor | None,
) -> None:
    """Run the scan."""
    from ssmtune.triton_kernels.ssd_scan import ssd_scan_fwd

    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    ssd_scan_fwd(*ssd_inputs(*inputs), cu_seqlens, (dt_softplus, dt_min, dt_max), *results)


def backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    gradients: list[Tensor | None],
) -> None:
    """Run the scan backward."""
    from ssmtune.triton_kernels.ssd_scan import ssd_scan_bwd

    x = inputs[0]
    dout = torch.zeros_like(x, memory_format=torch.contiguous_format) if dout is None else dense_heads(dout, x.dtype)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    options = dt_softplus, dt_min, dt_max
    ssd_scan_bwd(dout, parameter(dfinal_states), *ssd_inputs(*inputs), cu_seqlens, options, chunk_states, gradients)

"""Mamba-2's scan on Triton, forward and backward.

Rows are cut into chunks. Forward, one kernel finds what each chunk adds to the states, one passes the states on from
chunk to chunk, and one computes the outputs from them, all as products of matrices; backward the same with adjoints in
the place of states, and the products once for each of x, B and C. What several programs add to is written once by each
and summed in a fixed order afterwards, so that the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmtune.triton_kernels.selective_scan import partial_sums
from ssmtune.triton_kernels.ssd_scan_launches import ChunkedScan


def ssd_scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple[bool, float, float],
    out: Tensor,
    final_states: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan.

    Args:
        x, B, C: (batch, seqlen, nheads or groups, headdim or dstate), dense along the last two axes.
        dt: (batch, seqlen, nheads), float32, contiguous, as all that follow.
        A, dt_bias: (nheads,).
        D: (nheads, headdim).
        initial_states, state_offset: (nheads, headdim, dstate) shared, or (rows, nheads, headdim, dstate).
        output_offset: (nheads, headdim) shared, or (rows, nheads, headdim).
        cu_seqlens: (rows + 1,); without it there are as many rows as in the batch.
        options: dt_softplus, dt_min and dt_max.
        out: (batch, seqlen, nheads, headdim).
        final_states: (rows, nheads, headdim, dstate).
        chunk_states: (chunks, nheads, headdim, dstate), the states before each chunk, or None to keep nothing.
    """
    scan = ChunkedScan(x, dt, A, B, C, dt_bias, cu_seqlens, options)
    if chunk_states is None:
        chunk_states = final_states.new_empty(scan.chunks, *final_states.shape[1:])
    with torch.cuda.device_of(x):
        scan.states(x, B, initial_states, final_states, chunk_states, reverse=False)
        scan.products(
            C, B, x, chunk_states, out, reverse=False, state_offset=state_offset, D=D, output_offset=output_offset
        )


def ssd_scan_bwd(
    dout: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    cu_seqlens: Tensor | None,
    options: tuple[bool, float, float],
    chunk_states: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    """Run the scan backward.

    Args:
        dout: (batch, seqlen, nheads, headdim), as x.
        dfinal_states: (rows, nheads, headdim, dstate), or None for zero.
        x to chunk_states: as for `ssd_scan_fwd`, which filled chunk_states.
        gradients: of the ten tensors x to output_offset, None where not wanted; contiguous, in float32 but that of x.
    """
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_states, dstate_offset, doutput_offset = gradients
    scan = ChunkedScan(x, dt, A, B, C, dt_bias, cu_seqlens, options)
    steps = any(gradient is not None for gradient in (ddt, dA, ddt_bias))
    offsets = any(gradient is not None for gradient in (dD, dstate_offset, doutput_offset))
    per_row = (
        dstate_offset is not None and dstate_offset.dim() == 4,
        doutput_offset is not None and doutput_offset.dim() == 3,
    )
    # what packed sequences share is one sum over time; of those with offsets of their own only the GPU knows the pieces
    own_offsets = cu_seqlens is not None and any(per_row)
    rows, pieces = (scan.rows, 1) if own_offsets else (x.shape[0], scan.pieces_of_row)
    # (gradient, axis of the partial sums, how many)
    sums = [
        *((gradient, 0, scan.chunks) for gradient in (dA, ddt_bias)),
        *((gradient, 3, scan.ranges_of_group) for gradient in (dB, dC)),
        (dinitial_states, 0, 1 if initial_states is None or initial_states.dim() == 4 else scan.rows),
        (dD, 0, rows * pieces),
        (dstate_offset, *((1, pieces) if per_row[0] else (0, rows * pieces))),
        (doutput_offset, *((1, pieces) if per_row[1] else (0, rows * pieces))),
    ]
    partial = [partial_sums(*entry) for entry in sums]
    of_A, of_bias, of_B, of_C, of_states, *of_offsets = partial
    with torch.cuda.device_of(x):
        if steps or any(gradient is not None for gradient in (dx, dB, dinitial_states)):
            adjoints = torch.empty_like(chunk_states)
            scan.states(dout, C, dfinal_states, of_states, adjoints, reverse=True)
        if dx is not None:
            scan.products(B, C, dout, adjoints, dx, reverse=True, D=D)
        if dB is not None:
            scan.products(x, dout, C, adjoints, of_B.flatten(2, -2), reverse=True)
        if dC is not None:
            scan.products(dout, x, B, chunk_states, of_C.flatten(2, -2), reverse=False, state_offset=state_offset)
        if steps:
            scan.steps_bwd(*scan.decays(dout, chunk_states, adjoints), ddt, of_A, of_bias)
        if offsets:
            scan.offsets_bwd(dout, *of_offsets, rows, pieces, cu_seqlens if own_offsets else None)
    for (gradient, axis, _), shares in zip(sums, partial, strict=True):
        if shares is not gradient:
            torch.sum(shares, axis, out=gradient)

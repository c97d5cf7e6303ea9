"""The selective scan on Triton: how it is laid out over programs, and the calls of its kernels.

A program is one warp with a tile of 512 states, 16 to a thread, that walks along time: min(32, 512 / dstate) channels
of a group, dstate rounded up to a power of two. Programs share neither barriers nor sums: gradients that several of
them add to are written once by each, and summed in a fixed order afterwards, so that the same call gives the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ssmtune.triton_kernels.selective_scan_bwd import selective_scan_bwd_kernel
from ssmtune.triton_kernels.selective_scan_fwd import selective_scan_fwd_kernel
from ssmtune.triton_kernels.selective_scan_segments import selective_scan_carry_kernel, selective_scan_segment_kernel

# steps between the states that the forward pass keeps; the backward pass needs room for those of one such chunk, and
# on an H100 or H200 that of all the programs which run at once just fits its L2 cache
CHUNK_SIZE = 32
# steps worked on at once, powers of two that divide CHUNK_SIZE: a tile of 8 is what vector loads want, and backward
# no more than the states of 2 fit a thread's registers
FORWARD_STEPS = 8
BACKWARD_STEPS = 2


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and 0 for the interpreter, which gains nothing by splitting."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def chunks_of_segment(programs: int, n_chunks: int, n_multiprocessors: int) -> int:
    """Return how many chunks of a row one program works on, where that many programs could work on whole rows.

    All of them if each of a multiprocessor's four schedulers gets a warp. Otherwise the row is split in as many
    segments as give each scheduler four: that costs one pass more, over half of the work, but a warp alone fills
    about half of a scheduler.
    """
    schedulers = 4 * n_multiprocessors
    if programs >= schedulers:
        return n_chunks
    return triton.cdiv(n_chunks, min(triton.cdiv(4 * schedulers, programs), n_chunks))


@dataclass(frozen=True)
class _Layout:
    """Sizes that all kernels take, by the names of their arguments."""

    rows: int
    batch: int
    dim: int
    seqlen: int
    dstate: int
    groups: int
    n_blocks: int
    n_segments: int
    segment: int
    block_n: int
    block_d: int

    @property
    def programs(self) -> int:
        return self.rows * self.n_segments * self.groups * self.n_blocks

    def sizes(self) -> dict[str, int]:
        names = ("seqlen", "dim", "groups", "n_blocks", "n_segments", "segment")
        return {name: getattr(self, name) for name in names} | {"group_dim": self.dim // self.groups}

    def options(self) -> dict[str, int]:
        blocks = {"DSTATE": self.dstate, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        # unfused, a multiplication and an addition are two instructions, and that is the default from triton 3.10 on
        return blocks | {"num_warps": 1, "enable_fp_fusion": True}


def _layout(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> _Layout:
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    groups = B.shape[1]
    block_n = triton.next_power_of_2(dstate)
    block_d = min(max(512 // block_n, 1), 32, triton.next_power_of_2(dim // groups))
    n_blocks = triton.cdiv(dim // groups, block_d)
    rows, segment = batch, seqlen
    if cu_seqlens is not None:
        # sequences of their own length each are not split further
        rows = cu_seqlens.shape[0] - 1
    else:
        n_chunks = triton.cdiv(seqlen, CHUNK_SIZE)
        segment = CHUNK_SIZE * chunks_of_segment(batch * groups * n_blocks, n_chunks, multiprocessors(u.device))
    n_segments = triton.cdiv(seqlen, segment)
    return _Layout(rows, batch, dim, seqlen, dstate, groups, n_blocks, n_segments, segment, block_n, block_d)


def _rows_of_states(B: Tensor) -> Tensor:
    """Return B or C, much smaller than u, contiguous in float32: (batch, groups, seqlen, dstate)."""
    return (B.unsqueeze(1) if B.dim() == 3 else B).transpose(-2, -1).float().contiguous()


def _strides(**sequences: Tensor | None) -> dict[str, int]:
    strides = {}
    for name, x in sequences.items():
        for axis, stride in zip(("batch", "dim", "time"), (0, 0, 0) if x is None else x.stride(), strict=True):
            strides[f"stride_{name}_{axis}"] = stride
    return strides


def _row_stride(parameter: Tensor | None, dims: int) -> int:
    return 0 if parameter is None or parameter.dim() == dims else parameter.stride(0)


def _segment_states(
    layout: _Layout,
    x: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    first: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Return the state before each segment, or the adjoint after it, (batch * n_segments, dim, dstate)."""
    n_sums = layout.batch * layout.n_segments
    states = A.new_empty(n_sums, layout.dim, layout.dstate)
    if x is None:
        x = delta.new_zeros(1).expand_as(delta)
    sizes = A.new_empty(n_sums, layout.dim)
    selective_scan_segment_kernel[(layout.programs,)](
        x, delta, B, z, A, delta_bias, states, sizes,
        **layout.sizes(), **_strides(x=x, delta=delta, z=z), **layout.options(),
        REVERSE=reverse, DELTA_SOFTPLUS=delta_softplus, STEPS=min(FORWARD_STEPS, CHUNK_SIZE),
    )  # fmt: skip
    n_blocks = triton.cdiv(layout.dim, layout.block_d)
    selective_scan_carry_kernel[(layout.batch * n_blocks,)](
        states, sizes, A, first, layout.dim, n_blocks, layout.n_segments, _row_stride(first, 2),
        REVERSE=reverse, **layout.options(),
    )  # fmt: skip
    return states


def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor,
    chunk_states: Tensor | None,
) -> None:
    """Run the scan.

    Args:
        u, delta, z, out: (batch, dim, seqlen), any strides.
        A: (dim, dstate), float32, contiguous, as all parameters.
        B, C: (batch, dstate, seqlen) or (batch, groups, dstate, seqlen), any strides.
        D, delta_bias: (dim,).
        initial_state, state_offset: (dim, dstate) shared, or (rows, dim, dstate).
        output_offset: (dim,) shared, or (rows, dim).
        cu_seqlens: (rows + 1,); without it there are as many rows as in the batch.
        last_state: (rows, dim, dstate), float32, contiguous.
        chunk_states: as `ssmtune.ops.triton.chunk_states_shape` says, or None to keep nothing for the backward pass.
    """
    B, C = _rows_of_states(B), _rows_of_states(C)
    layout = _layout(u, A, B, cu_seqlens)
    with torch.cuda.device_of(u):
        states = None
        if layout.n_segments > 1:
            states = _segment_states(
                layout, u, delta, A, B, None, delta_bias, delta_softplus, initial_state, reverse=False
            )
        selective_scan_fwd_kernel[(layout.programs,)](
            u, delta, B, C, z, A, D, delta_bias, initial_state, state_offset, output_offset,
            cu_seqlens, states, out, last_state, chunk_states,
            **layout.sizes(), **_strides(u=u, delta=delta, z=z, out=out),
            stride_initial_state=_row_stride(initial_state, 2),
            stride_state_offset=_row_stride(state_offset, 2), stride_output_offset=_row_stride(output_offset, 1),
            DELTA_SOFTPLUS=delta_softplus, CHUNK=CHUNK_SIZE, **layout.options(),
            STEPS=min(FORWARD_STEPS, CHUNK_SIZE),
        )  # fmt: skip


def _partial_sums(gradient: Tensor | None, axis: int, count: int) -> Tensor | None:
    """Return room for the partial sums of a gradient along a new axis: the gradient itself where there is only one."""
    if gradient is None or count == 1:
        return gradient
    return gradient.new_empty(*gradient.shape[:axis], count, *gradient.shape[axis:])


def selective_scan_bwd(
    dout: Tensor | None,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    gradients: list[Tensor | None],
) -> None:
    """Run the scan backward.

    Args:
        dout: (batch, dim, seqlen), any strides, or None for zero.
        dlast_state: (rows, dim, dstate), float32, contiguous, or None for zero.
        u to chunk_states: as for `selective_scan_fwd`, which filled chunk_states.
        gradients: of the eleven tensors u to output_offset, None where not wanted: those of sequences in any strides;
            those of B and C transposed views of contiguous (..., seqlen, dstate), and those of parameters contiguous,
            in float32.
    """
    B, C = _rows_of_states(B), _rows_of_states(C)
    layout = _layout(u, A, B, cu_seqlens)
    n_sums = layout.rows * layout.n_segments
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state, dstate_offset, doutput_offset = gradients
    # (gradient, axis of the partial sums, how many)
    sums = [
        (dA, 0, n_sums),
        *((None if gradient is None else gradient.transpose(-2, -1), 0, layout.n_blocks) for gradient in (dB, dC)),
        (dD, 0, n_sums),
        (ddelta_bias, 0, n_sums),
        (dinitial_state, 0, 1 if initial_state is None or initial_state.dim() == 3 else layout.rows),
        (dstate_offset, 0, n_sums)
        if state_offset is None or state_offset.dim() == 2
        else (dstate_offset, 1, layout.n_segments),
        (doutput_offset, 0, n_sums)
        if output_offset is None or output_offset.dim() == 1
        else (doutput_offset, 1, layout.n_segments),
    ]
    partial_sums = [_partial_sums(*entry) for entry in sums]
    states = any(gradient is not None for gradient in (ddelta, dA, dC, dz, ddelta_bias))
    adjoints = any(gradient is not None for gradient in (du, ddelta, dA, dB, ddelta_bias, dinitial_state))
    kept_states = CHUNK_SIZE // BACKWARD_STEPS * layout.block_n + 3 * CHUNK_SIZE
    scratch = A.new_empty(layout.programs, layout.block_d * kept_states)
    with torch.cuda.device_of(u):
        adjoint = dlast_state
        if layout.n_segments > 1 and adjoints:
            adjoint = _segment_states(
                layout, dout, delta, A, C, z, delta_bias, delta_softplus, dlast_state, reverse=True
            )
        selective_scan_bwd_kernel[(layout.programs,)](
            u, delta, B, C, z, dout, A, D, delta_bias, initial_state, state_offset, output_offset,
            cu_seqlens, chunk_states, adjoint, scratch,
            du, ddelta, dz, *partial_sums,
            layout.batch, **layout.sizes(),
            **_strides(u=u, delta=delta, z=z, dout=dout, du=du, ddelta=ddelta, dz=dz),
            stride_initial_state=_row_stride(initial_state, 2),
            stride_state_offset=_row_stride(state_offset, 2), stride_output_offset=_row_stride(output_offset, 1),
            STATES=states, ADJOINTS=adjoints, DELTA_SOFTPLUS=delta_softplus, CHUNK=CHUNK_SIZE, **layout.options(),
            STEPS=BACKWARD_STEPS,
        )  # fmt: skip
    for (gradient, axis, _), partial in zip(sums, partial_sums, strict=True):
        if partial is not gradient:
            torch.sum(partial, axis, out=gradient)

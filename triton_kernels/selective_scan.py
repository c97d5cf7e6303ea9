"""The selective scan on Triton: how it is laid out over programs, and the calls of its kernels.

A program is one warp with a tile of 512 states, 16 to a thread, that walks along time: min(32, 512 / dstate) channels
of a group, dstate rounded up to a power of two. Programs share neither barriers nor sums: gradients that several of
them add to are written once by each, and summed in a fixed order afterwards, so that the same call gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ssmtune.triton_kernels.selective_scan_bwd import selective_scan_bwd_kernel
from ssmtune.triton_kernels.selective_scan_fwd import selective_scan_fwd_kernel
from ssmtune.triton_kernels.selective_scan_segments import selective_scan_carry_kernel, selective_scan_segment_kernel

# steps between the states that the forward pass keeps; the backward pass needs room for those of one such chunk, and
# on an H100 or H200 that of all the programs which run at once just fits its L2 cache
CHUNK_SIZE = 32
# steps worked on at once, powers of two that divide CHUNK_SIZE: a tile of 8 is what vector loads want, and on the way
# back no more than the states of 2 fit a thread's registers
FORWARD_STEPS = 8
BACKWARD_STEPS = 2
# registers of a thread where each of a multiprocessor's four schedulers, which have 16384, holds that many warps
TWO_WARPS, THREE_WARPS = 255, 168


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, and 0 for the interpreter, which gains nothing by splitting."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def chunks_of_segment(n_blocks: int, n_rows: int, batch: int, n_chunks: int, n_multiprocessors: int) -> int:
    """Return how many chunks of time one program works on, where `n_blocks` programs stand side by side.

    All of them if each of a multiprocessor's four schedulers gets a warp from the rows: the batch, or the sequences
    packed in one entry of it. Otherwise time is split in as many segments as give each scheduler four warps: that
    costs one pass more, over half of the work, but a warp alone fills about half of a scheduler.
    """
    schedulers = 4 * n_multiprocessors
    if n_rows * n_blocks >= schedulers:
        return n_chunks
    return triton.cdiv(n_chunks, min(triton.cdiv(4 * schedulers, batch * n_blocks), n_chunks))


def steps_ahead(block_d: int, dstate_offset: bool) -> int:
    """Return how many steps the backward kernel runs forward at once.

    Two, whose tile of few channels has several threads compute each value; four where there are registers for them,
    which there are not for more than 64 states, nor beside the gradient of an offset.
    """
    return 4 if 8 <= block_d < 32 and not dstate_offset else 2


def _at_most(registers: int) -> dict[str, int]:
    """Return the option of NVIDIA's compiler; left to itself it moves values to memory to make room for a warp more."""
    if knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": registers}


@dataclass(frozen=True)
class _Layout:
    """Sizes that all kernels take, by the names of their arguments, and how many segments there are of all rows."""

    segments: int
    n_rows: int
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
        return self.segments * self.groups * self.n_blocks

    @property
    def is_split(self) -> bool:
        return self.segments > self.n_rows

    def sizes(self) -> dict[str, int]:
        names = ("seqlen", "dim", "groups", "n_blocks", "n_rows", "n_segments", "segment")
        return {name: getattr(self, name) for name in names} | {"group_dim": self.dim // self.groups}

    def options(self, registers: int) -> dict[str, int]:
        """Blocks, and how they are compiled: with how many registers to a thread, on NVIDIA."""
        blocks = {"DSTATE": self.dstate, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        # unfused, a multiplication and an addition are two instructions, and that is the default from triton 3.10 on
        return blocks | {"num_warps": 1, "enable_fp_fusion": True} | _at_most(registers)


def _layout(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None, split: bool = True) -> _Layout:
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    groups = B.shape[1]
    block_n = triton.next_power_of_2(dstate)
    block_d = min(max(512 // block_n, 1), 32, triton.next_power_of_2(dim // groups))
    n_blocks = triton.cdiv(dim // groups, block_d)
    n_rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_chunks = triton.cdiv(seqlen, CHUNK_SIZE)
    n_multiprocessors = multiprocessors(u.device) if split else 0
    segment = CHUNK_SIZE * chunks_of_segment(groups * n_blocks, n_rows, batch, n_chunks, n_multiprocessors)
    n_segments = triton.cdiv(seqlen, segment)
    # packed sequences have one segment more each than would be enough if they began where segments do
    segments = n_rows * n_segments if cu_seqlens is None else n_rows + n_segments - 1
    return _Layout(segments, n_rows, dim, seqlen, dstate, groups, n_blocks, n_segments, segment, block_n, block_d)


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
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    first: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Return the state before each segment, or the adjoint after it, (segments, dim, dstate)."""
    states = A.new_empty(layout.segments, layout.dim, layout.dstate)
    if x is None:
        x = delta.new_zeros(1).expand_as(delta)
    sizes = A.new_empty(layout.segments, layout.dim)
    selective_scan_segment_kernel[(layout.programs,)](
        x, delta, B, z, A, delta_bias, cu_seqlens, states, sizes,
        **layout.sizes(), **_strides(x=x, delta=delta, z=z), **layout.options(THREE_WARPS),
        REVERSE=reverse, DELTA_SOFTPLUS=delta_softplus, STEPS=min(FORWARD_STEPS, CHUNK_SIZE),
    )  # fmt: skip
    n_blocks = triton.cdiv(layout.dim, layout.block_d)
    selective_scan_carry_kernel[(layout.n_rows * n_blocks,)](
        states, sizes, A, first, cu_seqlens, layout.dim, n_blocks, layout.n_segments, layout.segment,
        _row_stride(first, 2), REVERSE=reverse, **layout.options(THREE_WARPS),
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
        if layout.is_split:
            states = _segment_states(
                layout, u, delta, A, B, None, delta_bias, cu_seqlens, delta_softplus, initial_state, reverse=False
            )
        selective_scan_fwd_kernel[(layout.programs,)](
            u, delta, B, C, z, A, D, delta_bias, initial_state, state_offset, output_offset,
            cu_seqlens, states, out, last_state, chunk_states,
            **layout.sizes(), **_strides(u=u, delta=delta, z=z, out=out),
            stride_initial_state=_row_stride(initial_state, 2),
            stride_state_offset=_row_stride(state_offset, 2), stride_output_offset=_row_stride(output_offset, 1),
            DELTA_SOFTPLUS=delta_softplus, CHUNK=CHUNK_SIZE,
            **layout.options(TWO_WARPS),
            # fewer of channels-first sequences, of which a thread loads several steps and needs registers for them
            STEPS=min(FORWARD_STEPS if u.stride(1) == 1 else FORWARD_STEPS // 2, CHUNK_SIZE),
        )  # fmt: skip


def partial_sums(
    gradient: Tensor | None, axis: int, count: int, allocate: Callable[..., Tensor] = torch.Tensor.new_empty
) -> Tensor | None:
    """Return room for the partial sums of a gradient along a new axis: the gradient itself where there is only one."""
    if gradient is None or count == 1:
        return gradient
    return allocate(gradient, (*gradient.shape[:axis], count, *gradient.shape[axis:]))


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
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state, dstate_offset, doutput_offset = gradients
    per_row = (
        dstate_offset is not None and dstate_offset.dim() == 3,
        doutput_offset is not None and doutput_offset.dim() == 2,
    )
    # packed sequences have segments of no fixed number to sum up
    layout = _layout(u, A, B, cu_seqlens, split=cu_seqlens is None or not any(per_row))
    segments = layout.segments
    # (gradient, axis of the partial sums, how many)
    sums = [
        (dA, 0, segments),
        *((None if gradient is None else gradient.transpose(-2, -1), 0, layout.n_blocks) for gradient in (dB, dC)),
        (dD, 0, segments),
        (ddelta_bias, 0, segments),
        (dinitial_state, 0, 1 if initial_state is None or initial_state.dim() == 3 else layout.n_rows),
        (dstate_offset, *((1, layout.n_segments) if per_row[0] else (0, segments))),
        (doutput_offset, *((1, layout.n_segments) if per_row[1] else (0, segments))),
    ]
    # the segments that packed sequences do not need write nothing
    allocate = torch.Tensor.new_zeros if cu_seqlens is not None and layout.is_split else torch.Tensor.new_empty
    partial = [partial_sums(*entry, allocate) for entry in sums]
    states = any(gradient is not None for gradient in (ddelta, dA, dC, dz, ddelta_bias))
    adjoints = any(gradient is not None for gradient in (du, ddelta, dA, dB, ddelta_bias, dinitial_state))
    kept_states = (CHUNK_SIZE // BACKWARD_STEPS + 1) * layout.block_n + 4 * CHUNK_SIZE
    scratch = A.new_empty(layout.programs, layout.block_d * kept_states)
    with torch.cuda.device_of(u):
        adjoint = dlast_state
        if layout.is_split and adjoints:
            adjoint = _segment_states(
                layout, dout, delta, A, C, z, delta_bias, cu_seqlens, delta_softplus, dlast_state, reverse=True
            )
        selective_scan_bwd_kernel[(layout.programs,)](
            u, delta, B, C, z, dout, A, D, delta_bias, initial_state, state_offset, output_offset,
            cu_seqlens, chunk_states, adjoint, scratch,
            du, ddelta, dz, *partial,
            batch=u.shape[0], **layout.sizes(),
            **_strides(u=u, delta=delta, z=z, dout=dout, du=du, ddelta=ddelta, dz=dz),
            stride_initial_state=_row_stride(initial_state, 2),
            stride_state_offset=_row_stride(state_offset, 2), stride_output_offset=_row_stride(output_offset, 1),
            STATES=states, ADJOINTS=adjoints, DELTA_SOFTPLUS=delta_softplus, CHUNK=CHUNK_SIZE,
            **layout.options(TWO_WARPS),
            STEPS=BACKWARD_STEPS, AHEAD=steps_ahead(layout.block_d, dstate_offset is not None),
        )  # fmt: skip
    for (gradient, axis, _), shares in zip(sums, partial, strict=True):
        if shares is not gradient:
            torch.sum(shares, axis, out=gradient)

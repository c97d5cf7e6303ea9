"""What a program of the selective scan works on: some channels of a group, and a segment of a row."""

import triton
import triton.language as tl

from ssmtune.triton_kernels.packed_sequences import sequence_of


@triton.jit
def locate_program(
    cu_seqlens_ptr, seqlen, group_dim, groups, n_blocks, n_rows, n_segments, segment, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return what a program works on.

    Its segment among all; the row and the entry of the batch; the block of channels, their group and the first of them;
    where the row begins and ends, and where in it the segment starts and stops.
    """
    i_program = tl.program_id(0) // (groups * n_blocks)
    if cu_seqlens_ptr is None:
        i_row = (i_program // n_segments).to(tl.int64)
        i_b = i_row
        begin = 0
        end = seqlen
        start = i_program % n_segments * segment
    else:
        i_row = sequence_of(i_program, cu_seqlens_ptr, n_rows, segment)
        begin = tl.load(cu_seqlens_ptr + i_row).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + i_row + 1).to(tl.int32)
        start = begin + (i_program - i_row - begin // segment) * segment
        i_row = i_row.to(tl.int64)
        i_b = i_row * 0
    i_group = tl.program_id(0) // n_blocks % groups
    i_block = tl.program_id(0) % n_blocks
    i_d = i_group * tl.cast(group_dim, tl.int64) + i_block * BLOCK_D
    return (
        i_program.to(tl.int64), i_row, i_b, i_block, i_group, i_d, begin, end, start, tl.minimum(start + segment, end)
    )  # fmt: skip


@triton.jit
def first_chunk_of(i_row, begin, cu_seqlens_ptr, seqlen, CHUNK: tl.constexpr):
    """Return the place of the first state that is kept of a row."""
    if cu_seqlens_ptr is None:
        return i_row * ((seqlen - 1) // CHUNK)
    else:
        return (begin - i_row) // CHUNK

"""Where the tiles of packed sequences are, whose lengths only the GPU knows."""

import triton
import triton.language as tl


@triton.jit
def sequence_of(i_tile, cu_seqlens_ptr, n_sequences, TILE):
    """Return the packed sequence that a tile belongs to.

    From begin // TILE + i on are the tiles of sequence i: those are enough, and a few too many stay empty.
    """
    low = i_tile * 0
    high = low + n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TILE + middle <= i_tile:
            low = middle
        else:
            high = middle
    return low

"""What the kernels of Mamba-2's scan share: chunks of rows, the decays between their steps, and products of matrices.

A program works on a chunk of CHUNK steps of a row, or on a tile of it, for one head. What depends on the steps of a
head alone is computed once, by `ssd_steps_kernel`, and lies as [chunks, heads, CHUNK]: their sizes, and the exponents
of what decays from the start of the chunk to the end of each.
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.packed_sequences import sequence_of


@triton.jit
def bounds_of_row(i_row, cu_seqlens_ptr, seqlen):
    """Where a row begins and ends; inside of the tensors whatever cu_seqlens holds, unchecked on a GPU."""
    if cu_seqlens_ptr is None:
        return i_row * 0, i_row * 0 + seqlen
    else:
        begin = tl.load(cu_seqlens_ptr + i_row).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + i_row + 1).to(tl.int64)
        return tl.minimum(tl.maximum(begin, 0), seqlen), tl.minimum(end, seqlen)


@triton.jit
def locate_chunk(i_chunk, cu_seqlens_ptr, seqlen, n_rows, CHUNK: tl.constexpr):
    """The row of a chunk and its entry of the batch, where the chunk starts, and where its row ends.

    Packed sequences have a few chunks too many, which start where their rows end or later.
    """
    if cu_seqlens_ptr is None:
        n_chunks = tl.cdiv(seqlen, CHUNK)
        i_row = (i_chunk // n_chunks).to(tl.int64)
        return i_row, i_row, i_chunk % n_chunks * CHUNK, i_row * 0 + seqlen
    else:
        i_row = sequence_of(i_chunk, cu_seqlens_ptr, n_rows, CHUNK).to(tl.int64)
        begin, end = bounds_of_row(i_row, cu_seqlens_ptr, seqlen)
        start = begin + (i_chunk - i_row - begin // CHUNK) * CHUNK
        return i_row, i_row * 0, tl.maximum(start, begin), end


@triton.jit
def chunks_of_row(i_row, cu_seqlens_ptr, seqlen, CHUNK: tl.constexpr):
    """The first chunk of a row, and how many it has."""
    begin, end = bounds_of_row(i_row, cu_seqlens_ptr, seqlen)
    if cu_seqlens_ptr is None:
        return i_row * tl.cdiv(seqlen, CHUNK), tl.cdiv(seqlen, CHUNK)
    else:
        return i_row + begin // CHUNK, tl.cdiv(end - begin, CHUNK)


@triton.jit
def rows_of(x_ptr, i_b, start, o_t, stride_batch, stride_time, offset):
    """Point at the steps o_t from a start on, of a head or group that begins `offset` into a step, [steps, 1].

    The base is one pointer of a program, and what a thread adds to it is 32 bits wide.
    """
    return x_ptr + (i_b * stride_batch + start * stride_time + offset) + o_t[:, None] * stride_time


@triton.jit
def load_tile(p_x, o_x, mask, size, OPERAND: tl.constexpr):
    """Read the columns o_x of rows as an operand of products, zeros for rows left out and past the size."""
    return tl.load(p_x + o_x[None, :], mask=mask[:, None] & (o_x < size)[None, :], other=0.0).to(OPERAND)


@triton.jit
def product(b_x, b_y, b_sum, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + b_x b_y, accumulated in float32."""
    return tl.dot(b_x.to(OPERAND), b_y.to(OPERAND), b_sum, input_precision=PRECISION)


@triton.jit
def decays_between(high, low, other_high, other_low, o_t, o_s, REVERSE: tl.constexpr):
    """What is left at steps o_t of what enters at o_s, or in reverse at o_s of what enters at o_t; [o_t, o_s].

    Exponents are differences of sums that are kept as two floats: after a step that forgets everything, those of single
    floats would be wrong by as much as whole steps.
    """
    exponent = (high[:, None] - other_high[None, :]) + (low[:, None] - other_low[None, :])
    enters_before = o_s[None, :] <= o_t[:, None]
    if REVERSE:
        exponent = -exponent
        enters_before = o_s[None, :] >= o_t[:, None]
    return tl.exp2(tl.where(enters_before, exponent, float("-inf")))


@triton.jit
def decays_to_end(high, low, p_high, p_low, CHUNK: tl.constexpr):
    """What is left at the end of the chunk of what enters at each step."""
    return tl.exp2((tl.load(p_high + CHUNK - 1) - high) + (tl.load(p_low + CHUNK - 1) - low))

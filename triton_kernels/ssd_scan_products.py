"""The products of a chunk of Mamba-2's scan, of which its output and three of its gradients are instances.

    result_t = (decay from the start) own_t S + sum_{s <= t} (own_t . key_s) (decay from s to t) dt_s value_s

    result  own  key   value  S                       in reverse, from the end, with dt of the result:
    out     C    B     x      state before            dx      B  C     dout  adjoint after
    dC      dout x     B      state before            dB      x  dout  C     adjoint after

dB and dC are sums over the heads of a group, of which a program takes some.
"""

import triton
import triton.language as tl

from ssmtune.triton_kernels.ssd_scan_chunks import (
    decays_between,
    decays_to_end,
    load_tile,
    locate_chunk,
    product,
    rows_of,
)


@triton.jit
def read_states(
    p_own, p_state, o_v, mask, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, STRIDE_KEY: tl.constexpr,
    STRIDE_VALUE: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own S, [TILE, BLOCK_V]."""
    b_read = tl.zeros([TILE, BLOCK_V], tl.float32)
    for k in range(0, KEY_SIZE, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_state = (o_k < KEY_SIZE)[:, None] & (o_v < VALUE_SIZE)[None, :]
        b_state = tl.load(p_state + o_k[:, None] * STRIDE_KEY + o_v[None, :] * STRIDE_VALUE, mask=m_state, other=0.0)
        b_read = product(load_tile(p_own, o_k, mask, KEY_SIZE, OPERAND), b_state, b_read, OPERAND, PRECISION)
    return b_read


@triton.jit(do_not_specialize=["seqlen", "n_rows"])
def ssd_products_kernel(
    # sequences [batch, seqlen, nheads or groups, KEY_SIZE] twice, and [batch, seqlen, groups or nheads, VALUE_SIZE]
    own_ptr, key_ptr, value_ptr,
    # [chunks, nheads, CHUNK]
    steps_ptr, high_ptr, low_ptr,
    # [chunks, nheads, HEADDIM, DSTATE], and what is read beside them [rows or 1, nheads, HEADDIM, DSTATE]
    states_ptr, state_offset_ptr,
    # [nheads, VALUE_SIZE], and [rows or 1, nheads, VALUE_SIZE]
    D_ptr, output_offset_ptr,
    cu_seqlens_ptr,
    # [batch, seqlen, n_ranges, VALUE_SIZE]
    out_ptr,
    # sizes: ranges of range_heads heads; heads that share an entry of own and key, and one of value
    seqlen, n_rows, nheads, n_ranges, range_heads, own_heads, value_heads,
    stride_own_batch, stride_own_time, stride_key_batch, stride_key_time, stride_value_batch, stride_value_time,
    stride_state_offset, stride_output_offset,
    REVERSE: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    STRIDE_KEY: tl.constexpr, STRIDE_VALUE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    V_BLOCKS: tl.constexpr = (VALUE_SIZE + BLOCK_V - 1) // BLOCK_V
    TILES: tl.constexpr = CHUNK // TILE
    i_range = tl.program_id(0) % n_ranges
    i_block = tl.program_id(0) // n_ranges
    o_v = i_block % V_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    i_tile = i_block // V_BLOCKS % TILES
    o_t = i_tile * TILE + tl.arange(0, TILE)
    # the tiles of what enters before, or in reverse is read after
    first = i_tile * TILE if REVERSE else 0
    stop = CHUNK if REVERSE else (i_tile + 1) * TILE
    i_chunk = (i_block // (V_BLOCKS * TILES)).to(tl.int64)
    i_row, i_b, start, end = locate_chunk(i_chunk, cu_seqlens_ptr, seqlen, n_rows, CHUNK)
    m_t = start + o_t < end
    m_v = o_v < VALUE_SIZE

    b_out = tl.zeros([TILE, BLOCK_V], tl.float32)
    for i in range(range_heads):
        i_head = i_range * range_heads + i
        vectors = (i_chunk * nheads + i_head) * CHUNK
        own = i_head // own_heads * KEY_SIZE
        p_own = rows_of(own_ptr, i_b, start, o_t, stride_own_batch, stride_own_time, own)
        value = i_head // value_heads * VALUE_SIZE
        b_high = tl.load(high_ptr + vectors + o_t)
        b_low = tl.load(low_ptr + vectors + o_t)

        state = i_head * (KEY_SIZE * VALUE_SIZE)
        b_read = read_states(
            p_own, states_ptr + i_chunk * nheads * (KEY_SIZE * VALUE_SIZE) + state, o_v, m_t, KEY_SIZE, VALUE_SIZE,
            STRIDE_KEY, STRIDE_VALUE, TILE, BLOCK_K, BLOCK_V, OPERAND, PRECISION,
        )  # fmt: skip
        if REVERSE:
            b_decay = decays_to_end(b_high, b_low, high_ptr + vectors, low_ptr + vectors, CHUNK)
            b_steps = tl.load(steps_ptr + vectors + o_t)
            b_out += b_read * (b_decay * b_steps)[:, None]
        else:
            b_out += b_read * tl.exp2(b_high)[:, None]
        if state_offset_ptr is not None:
            b_out += read_states(
                p_own, state_offset_ptr + i_row * stride_state_offset + state, o_v, m_t, KEY_SIZE, VALUE_SIZE,
                STRIDE_KEY, STRIDE_VALUE, TILE, BLOCK_K, BLOCK_V, OPERAND, PRECISION,
            )  # fmt: skip

        for s in range(first, stop, TILE):
            o_s = s + tl.arange(0, TILE)
            m_s = start + o_s < end
            p_key = rows_of(key_ptr, i_b, start, o_s, stride_key_batch, stride_key_time, own)
            p_value = rows_of(value_ptr, i_b, start, o_s, stride_value_batch, stride_value_time, value)
            b_pairs = tl.zeros([TILE, TILE], tl.float32)
            for k in range(0, KEY_SIZE, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                b_own = load_tile(p_own, o_k, m_t, KEY_SIZE, OPERAND)
                b_key = load_tile(p_key, o_k, m_s, KEY_SIZE, OPERAND)
                b_pairs = product(b_own, tl.trans(b_key), b_pairs, OPERAND, PRECISION)
            b_other_high = tl.load(high_ptr + vectors + o_s)
            b_other_low = tl.load(low_ptr + vectors + o_s)
            b_pairs *= decays_between(b_high, b_low, b_other_high, b_other_low, o_t, o_s, REVERSE)
            b_pairs *= b_steps[:, None] if REVERSE else tl.load(steps_ptr + vectors + o_s)[None, :]
            b_value = load_tile(p_value, o_v, m_s, VALUE_SIZE, OPERAND)
            b_out = product(b_pairs, b_value, b_out, OPERAND, PRECISION)

        if D_ptr is not None:
            b_D = tl.load(D_ptr + i_head * VALUE_SIZE + o_v, mask=m_v, other=0.0)
            p_same = rows_of(value_ptr, i_b, start, o_t, stride_value_batch, stride_value_time, value)
            b_out += b_D[None, :] * load_tile(p_same, o_v, m_t, VALUE_SIZE, tl.float32)
        if output_offset_ptr is not None:
            p_offset = output_offset_ptr + i_row * stride_output_offset + i_head * VALUE_SIZE + o_v
            b_out += tl.load(p_offset, mask=m_v, other=0.0)[None, :]

    row = (i_b * seqlen + start + o_t) * n_ranges + i_range
    p_out = out_ptr + row[:, None] * VALUE_SIZE + o_v[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])

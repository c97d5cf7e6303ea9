"""The causal depthwise convolution, forward and backward.

    y_t = bias + sum_k weight_k x_{t - width + 1 + k}                out_t = y_t, or silu(y_t)
    g_t = dout_t, or dout_t silu'(y_t)                               dx_t = sum_k weight_k g_{t + width - 1 - k}
    dweight_k = sum_t g_t x_{t - width + 1 + k}                      dbias = sum_t g_t

A lane of a tile computes STEPS neighbouring steps of one channel in registers, and reads the few around them that those
need. Lanes lie along the axis that is dense in memory: along the channels, or along time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmtune.triton_kernels.packed_sequences import sequence_of

STEPS = 8
# of the backward kernel: enough to fill any GPU
PROGRAMS = 2048


@triton.jit
def locate_tile(i_tile, cu_seqlens_ptr, seqlen, n_sequences, TILE: tl.constexpr):
    """The row and the sequence of a tile, where that begins and its length, and how many of its steps come before."""
    if cu_seqlens_ptr is None:
        n_tiles = tl.cdiv(seqlen, TILE)
        i_b = (i_tile // n_tiles).to(tl.int64)
        i_s = i_b
        begin = i_b * 0
        length = seqlen
        start = (i_tile % n_tiles) * TILE
    else:
        low = sequence_of(i_tile, cu_seqlens_ptr, n_sequences, TILE)
        i_s = low.to(tl.int64)
        i_b = i_s * 0
        # nobody has checked the values on a GPU
        first = tl.maximum(tl.load(cu_seqlens_ptr + i_s).to(tl.int32), 0)
        length = tl.minimum(tl.load(cu_seqlens_ptr + i_s + 1).to(tl.int32), seqlen) - first
        begin = first.to(tl.int64)
        start = (i_tile - low - first // TILE) * TILE
    return i_b, i_s, begin, length, start


@triton.jit
def tile_pointers(x_ptr, i_b, begin, o_t, o_d, stride_batch, stride_dim, stride_time):
    """Pointers to the steps o_t of a sequence, [BLOCK_T, BLOCK_D], and how far it is to the next step."""
    stride_time = tl.cast(stride_time, tl.int64)
    p_x = x_ptr + i_b * stride_batch + begin * stride_time
    return p_x + o_t.to(tl.int64)[:, None] * stride_time + o_d[None, :] * stride_dim, stride_time


@triton.jit
def load_inputs(
    p_x, stride_time, initial_states_ptr, i_s, o_t, length, o_d, dim, WIDTH: tl.constexpr, AFTER: tl.constexpr
):
    """x from width - 1 steps before o_t until AFTER steps from it, as a tuple; [BLOCK_T, BLOCK_D] each."""
    m_d = (o_d < dim)[None, :]
    b_x = ()
    for j in tl.static_range(1 - WIDTH, AFTER):
        t = o_t + j
        m_t = t < length
        if j < 0:
            m_t &= t >= 0
        b_step = tl.load(p_x + j * stride_time, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)
        if j < 0 and initial_states_ptr is not None:
            p_initial = initial_states_ptr + (i_s * dim + o_d)[None, :] * (WIDTH - 1) + (t + WIDTH - 1)[:, None]
            b_step += tl.load(p_initial, mask=(t < 0)[:, None] & m_d, other=0.0)
        b_x += (b_step,)
    return b_x


@triton.jit
def load_parameters(weight_ptr, bias_ptr, o_d, dim, WIDTH: tl.constexpr):
    """Weights and bias, [1, BLOCK_D] each."""
    m_d = (o_d < dim)[None, :]
    b_weight = ()
    for k in tl.static_range(WIDTH):
        b_weight += (tl.load(weight_ptr + o_d[None, :] * WIDTH + k, mask=m_d, other=0.0),)
    b_bias = tl.zeros_like(b_weight[0])
    if bias_ptr is not None:
        b_bias += tl.load(bias_ptr + o_d[None, :], mask=m_d, other=0.0)
    return b_weight, b_bias


@triton.jit(do_not_specialize=["seqlen", "n_sequences"])
def causal_conv1d_fwd_kernel(
    # pointers; those of optional tensors may be None
    x_ptr, weight_ptr, bias_ptr, initial_states_ptr, cu_seqlens_ptr, out_ptr, final_states_ptr,
    # sizes
    dim, seqlen, n_sequences,
    # strides in elements
    stride_x_batch, stride_x_dim, stride_x_time, stride_out_batch, stride_out_dim, stride_out_time,
    # meta
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_T * STEPS
    n_blocks = tl.cdiv(dim, BLOCK_D)
    o_d = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < dim)[None, :]
    i_tile = tl.program_id(0) // n_blocks
    i_b, i_s, begin, length, start = locate_tile(i_tile, cu_seqlens_ptr, seqlen, n_sequences, TILE)
    o_t = start + tl.arange(0, BLOCK_T) * STEPS
    b_weight, b_bias = load_parameters(weight_ptr, bias_ptr, o_d, dim, WIDTH)
    p_x, next_x = tile_pointers(x_ptr, i_b, begin, o_t, o_d, stride_x_batch, stride_x_dim, stride_x_time)
    b_x = load_inputs(p_x, next_x, initial_states_ptr, i_s, o_t, length, o_d, dim, WIDTH, STEPS)
    p_out, next_out = tile_pointers(out_ptr, i_b, begin, o_t, o_d, stride_out_batch, stride_out_dim, stride_out_time)
    for j in tl.static_range(STEPS):
        b_y = b_bias
        for k in tl.static_range(WIDTH):
            b_y += b_weight[k] * b_x[j + k]
        if SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        b_y = b_y.to(out_ptr.dtype.element_ty)
        tl.store(p_out + j * next_out, b_y, mask=(o_t + j < length)[:, None] & m_d)
    if final_states_ptr is not None:
        # not in the last tile alone: they may begin in the one before it
        if length - (WIDTH - 1) < start + TILE:
            for j in tl.static_range(1 - WIDTH, STEPS):
                t = o_t + j
                # steps before the lane are another lane's, but for those before the sequence
                m_t = (t >= length - (WIDTH - 1)) & (t < length) & ((t < 0) | (j >= 0))
                o_final = (i_s * dim + o_d)[None, :] * (WIDTH - 1) + (t - length + WIDTH - 1)[:, None]
                b_final = b_x[j + WIDTH - 1].to(final_states_ptr.dtype.element_ty)
                tl.store(final_states_ptr + o_final, b_final, mask=m_t[:, None] & m_d)


@triton.jit(do_not_specialize=["seqlen", "n_sequences", "n_tiles", "tiles_per_program"])
def causal_conv1d_bwd_kernel(
    # pointers; those of optional tensors and of gradients that nobody asked for may be None
    dout_ptr, dfinal_states_ptr, x_ptr, weight_ptr, bias_ptr, initial_states_ptr, cu_seqlens_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dinitial_states_ptr,
    # sizes
    dim, seqlen, n_sequences, n_tiles, tiles_per_program,
    # strides in elements
    stride_dout_batch, stride_dout_dim, stride_dout_time, stride_x_batch, stride_x_dim, stride_x_time,
    stride_dx_batch, stride_dx_dim, stride_dx_time,
    # meta
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = BLOCK_T * STEPS
    n_blocks = tl.cdiv(dim, BLOCK_D)
    o_d = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < dim)[None, :]
    i_p = tl.program_id(0) // n_blocks
    b_weight, b_bias = load_parameters(weight_ptr, bias_ptr, o_d, dim, WIDTH)
    b_dweight = ()
    for _ in tl.static_range(WIDTH):
        b_dweight += (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    b_dbias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)

    for i_tile in range(i_p * tiles_per_program, min((i_p + 1) * tiles_per_program, n_tiles)):
        i_b, i_s, begin, length, start = locate_tile(i_tile, cu_seqlens_ptr, seqlen, n_sequences, TILE)
        o_t = start + tl.arange(0, BLOCK_T) * STEPS
        p_x, next_x = tile_pointers(x_ptr, i_b, begin, o_t, o_d, stride_x_batch, stride_x_dim, stride_x_time)
        b_x = load_inputs(p_x, next_x, initial_states_ptr, i_s, o_t, length, o_d, dim, WIDTH, STEPS + WIDTH - 1)
        p_dout, next_dout = tile_pointers(
            dout_ptr, i_b, begin, o_t, o_d, stride_dout_batch, stride_dout_dim, stride_dout_time
        )
        # the gradients before SiLU, of the steps of the lane and the width - 1 after it
        b_g = ()
        for j in tl.static_range(STEPS + WIDTH - 1):
            m_step = (o_t + j < length)[:, None] & m_d
            b_step = tl.load(p_dout + j * next_dout, mask=m_step, other=0.0).to(tl.float32)
            if SILU:
                b_y = b_bias
                for k in tl.static_range(WIDTH):
                    b_y += b_weight[k] * b_x[j + k]
                b_s = 1.0 / (1.0 + tl.exp(-b_y))
                b_step *= b_s * (1.0 + b_y * (1.0 - b_s))
            b_g += (b_step,)

        for j in tl.static_range(1 - WIDTH, STEPS):
            if (j < 0 and dinitial_states_ptr is not None) or (j >= 0 and dx_ptr is not None):
                t = o_t + j
                b_dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for k in tl.static_range(WIDTH):
                    if j + WIDTH - 1 - k >= 0:
                        b_dx += b_weight[k] * b_g[j + WIDTH - 1 - k]
                o_states = (i_s * dim + o_d)[None, :] * (WIDTH - 1) + t[:, None] + (WIDTH - 1)
                if dfinal_states_ptr is not None:
                    # the last width - 1 steps are the final states too
                    m_final = (t >= length - (WIDTH - 1)) & (t < length)
                    b_dx += tl.load(dfinal_states_ptr + o_states - length, mask=m_final[:, None] & m_d, other=0.0)
                if j < 0:
                    m_initial = (o_t == 0) & (o_t < length)
                    tl.store(dinitial_states_ptr + o_states, b_dx, mask=m_initial[:, None] & m_d)
                else:
                    p_dx, next_dx = tile_pointers(
                        dx_ptr, i_b, begin, o_t, o_d, stride_dx_batch, stride_dx_dim, stride_dx_time
                    )
                    b_dx = b_dx.to(dx_ptr.dtype.element_ty)
                    tl.store(p_dx + j * next_dx, b_dx, mask=(t < length)[:, None] & m_d)

        for j in tl.static_range(STEPS):
            if dweight_ptr is not None:
                b_sums = ()
                for k in tl.static_range(WIDTH):
                    b_sums += (b_dweight[k] + b_g[j] * b_x[j + k],)
                b_dweight = b_sums
            if dbias_ptr is not None:
                b_dbias += b_g[j]

    # one row for each program, summed up by another kernel: in the same order every time
    o_p = i_p.to(tl.int64) * dim + o_d
    if dweight_ptr is not None:
        for k in tl.static_range(WIDTH):
            tl.store(dweight_ptr + o_p * WIDTH + k, tl.sum(b_dweight[k], axis=0), mask=o_d < dim)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + o_p, tl.sum(b_dbias, axis=0), mask=o_d < dim)


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    out: Tensor,
    final_states: Tensor | None,
) -> None:
    """Convolve `x`.

    Args:
        x, out: (batch, dim, seqlen), one dtype, dense along dim or seqlen.
        weight: (dim, width), float32, contiguous.
        bias: (dim,), float32.
        initial_states: (rows, dim, width - 1), float32, contiguous; rows are those of x, or n_sequences.
        cu_seqlens: (n_sequences + 1,), int32 or int64.
        final_states: (rows, dim, width - 1), dtype of x, contiguous.
    """
    _, dim, seqlen = x.shape
    # 16 bytes for each thread
    block_t, block_d, n_tiles, n_sequences = _tiles(x, cu_seqlens, 16 // x.element_size())
    with torch.cuda.device_of(x):
        causal_conv1d_fwd_kernel[(n_tiles * triton.cdiv(dim, block_d),)](
            x, weight, bias, initial_states, cu_seqlens, out, final_states,
            dim, seqlen, n_sequences, *x.stride(), *out.stride(),
            WIDTH=weight.shape[1], SILU=silu, STEPS=STEPS, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def causal_conv1d_bwd(
    dout: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
) -> None:
    """Write the gradients that are not None.

    Args:
        dout, dx: like x.
        dfinal_states, dinitial_states: like initial_states.
        dweight: (dim, width), float32.
        dbias: (dim,), float32.
        x, weight, bias, initial_states, cu_seqlens: as in `causal_conv1d_fwd`.
    """
    _, dim, seqlen = x.shape
    # 4 lanes for each thread keep what they need in registers
    block_t, block_d, n_tiles, n_sequences = _tiles(x, cu_seqlens, 4)
    n_blocks = triton.cdiv(dim, block_d)
    # the more tiles a program sums up, the fewer sums are left
    tiles_per_program = min(max(n_tiles * n_blocks // PROGRAMS, 1), 16)
    n_programs = triton.cdiv(n_tiles, tiles_per_program)
    partial_sums = [
        None if tensor is None else x.new_empty(n_programs, *tensor.shape, dtype=torch.float32)
        for tensor in (dweight, dbias)
    ]
    with torch.cuda.device_of(x):
        causal_conv1d_bwd_kernel[(n_programs * n_blocks,)](
            dout, dfinal_states, x, weight, bias, initial_states, cu_seqlens, dx, *partial_sums, dinitial_states,
            dim, seqlen, n_sequences, n_tiles, tiles_per_program,
            *dout.stride(), *x.stride(), *((0, 0, 0) if dx is None else dx.stride()),
            WIDTH=weight.shape[1], SILU=silu, STEPS=STEPS, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    for tensor, sums in zip((dweight, dbias), partial_sums, strict=True):
        if tensor is not None:
            torch.sum(sums, dim=0, out=tensor)


def _tiles(x: Tensor, cu_seqlens: Tensor | None, lanes_per_thread: int) -> tuple[int, int, int, int]:
    """The lanes of a tile along time and channels, how many tiles hold all sequences, and the number of those."""
    batch, dim, seqlen = x.shape
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.stride(1) == 1:
        block_d = min(triton.next_power_of_2(dim), 32 * lanes_per_thread)
        block_t = 128 * lanes_per_thread // block_d
    else:
        # lanes side by side in time find their steps in the same cache lines
        lanes = triton.cdiv(seqlen * batch, n_sequences * STEPS)
        block_t = min(triton.next_power_of_2(lanes), 128)
        block_d = 512 // block_t
    tile = block_t * STEPS
    n_tiles = batch * triton.cdiv(seqlen, tile) if cu_seqlens is None else seqlen // tile + n_sequences
    return block_t, block_d, n_tiles, n_sequences

"""The steps of Mamba-2's scan: their sizes and how states decay over them, and on the way back their gradients."""

import triton
import triton.language as tl

from ssmtune.triton_kernels.selective_scan_tiles import softplus
from ssmtune.triton_kernels.ssd_scan_chunks import locate_chunk


@triton.jit
def read_steps(
    dt_ptr, A_ptr, dt_bias_ptr, cu_seqlens_ptr, seqlen, n_rows, nheads, dt_min, dt_max,
    DT_SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program's chunk and heads; of its tile [CHUNK, BLOCK_H] the mask, and the offsets in dt and in vectors; A of
    the heads, and the steps' sizes with their slopes by dt.

    Steps past the end have size 0: they change nothing.
    """
    n_blocks = tl.cdiv(nheads, BLOCK_H)
    i_chunk = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_h = tl.program_id(0) % n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < nheads
    _, i_b, start, end = locate_chunk(i_chunk, cu_seqlens_ptr, seqlen, n_rows, CHUNK)
    o_t = tl.arange(0, CHUNK)
    mask = (start + o_t < end)[:, None] & m_h[None, :]
    o_dt = (i_b * seqlen + start + o_t)[:, None] * nheads + o_h[None, :]
    o_v = (i_chunk * nheads + o_h)[None, :] * CHUNK + o_t[:, None]

    b_A = tl.load(A_ptr + o_h, mask=m_h, other=0.0)
    b_dt = tl.load(dt_ptr + o_dt, mask=mask, other=0.0)
    if dt_bias_ptr is not None:
        b_dt += tl.load(dt_bias_ptr + o_h, mask=m_h, other=0.0)[None, :]
    b_slope = tl.full(b_dt.shape, 1.0, tl.float32)
    if DT_SOFTPLUS:
        b_raw = b_dt
        b_dt, b_e = softplus(b_raw)
        b_slope = tl.where(b_raw < 0.0, b_e, 1.0) / (1.0 + b_e)
    b_slope = tl.where(mask & (b_dt >= dt_min) & (b_dt <= dt_max), b_slope, 0.0)
    b_dt = tl.where(mask, tl.minimum(tl.maximum(b_dt, dt_min), dt_max), 0.0)
    return i_chunk, o_h, mask, o_dt, o_v, b_A, b_dt, b_slope


@triton.jit(do_not_specialize=["seqlen", "n_rows"])
def ssd_steps_kernel(
    # [batch, seqlen, nheads], [nheads], [nheads], [rows + 1]
    dt_ptr, A_ptr, dt_bias_ptr, cu_seqlens_ptr,
    # results [chunks, nheads, CHUNK]
    steps_ptr, high_ptr, low_ptr,
    seqlen, n_rows, nheads, dt_min, dt_max,
    DT_SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    _, o_h, _, _, o_v, b_A, b_dt, _ = read_steps(
        dt_ptr, A_ptr, dt_bias_ptr, cu_seqlens_ptr, seqlen, n_rows, nheads, dt_min, dt_max, DT_SOFTPLUS, CHUNK, BLOCK_H
    )
    m_h = o_h < nheads
    b_sum = tl.cumsum(b_dt.to(tl.float64) * (b_A.to(tl.float64) * 1.4426950408889634)[None, :], axis=0)
    b_high = b_sum.to(tl.float32)
    tl.store(steps_ptr + o_v, b_dt, mask=m_h[None, :])
    tl.store(high_ptr + o_v, b_high, mask=m_h[None, :])
    tl.store(low_ptr + o_v, (b_sum - b_high.to(tl.float64)).to(tl.float32), mask=m_h[None, :])


@triton.jit(do_not_specialize=["seqlen", "n_rows", "n_chunks"])
def ssd_steps_bwd_kernel(
    dt_ptr, A_ptr, dt_bias_ptr, cu_seqlens_ptr,
    # the gradients of the steps' sizes as factors, and of the logarithms of decays, as partial sums
    # [PARTS, chunks, nheads, CHUNK]
    dsteps_ptr, ddecays_ptr,
    # results [batch, seqlen, nheads], and partial sums [chunks, nheads]
    ddt_ptr, dA_ptr, ddt_bias_ptr,
    seqlen, n_rows, n_chunks, nheads, dt_min, dt_max,
    DT_SOFTPLUS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_chunk, o_h, mask, o_dt, o_v, b_A, b_dt, b_slope = read_steps(
        dt_ptr, A_ptr, dt_bias_ptr, cu_seqlens_ptr, seqlen, n_rows, nheads, dt_min, dt_max, DT_SOFTPLUS, CHUNK, BLOCK_H
    )
    m_h = o_h < nheads
    b_dsteps = tl.zeros([CHUNK, BLOCK_H], tl.float32)
    b_ddecays = tl.zeros([CHUNK, BLOCK_H], tl.float32)
    for i in range(PARTS):
        part = i * tl.cast(n_chunks, tl.int64) * nheads * CHUNK
        b_dsteps += tl.load(dsteps_ptr + part + o_v, mask=mask, other=0.0)
        b_ddecays += tl.load(ddecays_ptr + part + o_v, mask=mask, other=0.0)
    b_ddt = (b_A[None, :] * b_ddecays + b_dsteps) * b_slope
    if ddt_ptr is not None:
        tl.store(ddt_ptr + o_dt, b_ddt, mask=mask)
    if dA_ptr is not None:
        tl.store(dA_ptr + i_chunk * nheads + o_h, tl.sum(b_dt * b_ddecays, axis=0), mask=m_h)
    if ddt_bias_ptr is not None:
        tl.store(ddt_bias_ptr + i_chunk * nheads + o_h, tl.sum(b_ddt, axis=0), mask=m_h)

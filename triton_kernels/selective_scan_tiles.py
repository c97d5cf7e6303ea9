"""What the kernels of the selective scan share: tiles of steps, and how a step becomes an exponent.

One warp works on a state tile [BLOCK_N, BLOCK_D], in registers while it walks along time, and on the sequences in tiles
[BLOCK_D, STEPS]: loads, stores and everything that has no state index are done for STEPS steps at once, each by one
thread; only then is each step handed to all the threads that hold its states.

A thread holds 4 states of 4 channels, the layout that loading A gives: of 8 x 4 threads, sums over the states take two
shuffles and sums over the channels three. A tile that is to stay in that layout must come from memory: one of zeros has
a layout of its own, and with it everything it is added to.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def by_thread(b_x, BLOCK_D: tl.constexpr):
    """Put channels in the order of state tiles: 0, 4, 8, ..., 1, 5, 9, ...

    A thread has every eighth of 32 in a state tile: so these are neighbours, which one vector load gets it.
    """
    OWN: tl.constexpr = 4 if BLOCK_D > 4 else BLOCK_D
    return tl.reshape(tl.trans(tl.reshape(b_x, [BLOCK_D // OWN, OWN])), [BLOCK_D])


@triton.jit
def by_channel(b_x, BLOCK_D: tl.constexpr):
    """Undo `by_thread`."""
    OWN: tl.constexpr = 4 if BLOCK_D > 4 else BLOCK_D
    return tl.reshape(tl.trans(tl.reshape(b_x, [OWN, BLOCK_D // OWN])), [BLOCK_D])


@triton.jit
def channels_of(i_block, group_dim, DSTATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a program's states, its channels counted from its first, which of these there are, and the same of a state
    tile [BLOCK_N, BLOCK_D]: offsets and mask. Small offsets take one pointer for a whole tile.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    # as `by_thread` has it, which would hide from the compiler what is next to what
    OWN: tl.constexpr = 4 if BLOCK_D > 4 else BLOCK_D
    LANES: tl.constexpr = BLOCK_D // OWN
    o_s = o_d % LANES * OWN + o_d // LANES
    m_nd = (o_n < DSTATE)[:, None] & (i_block * BLOCK_D + o_s < group_dim)[None, :]
    return o_n, o_d, i_block * BLOCK_D + o_d < group_dim, o_s[None, :] * DSTATE + o_n[:, None], m_nd


@triton.jit
def steps_of(b_x, BLOCK_D: tl.constexpr, STEPS: tl.constexpr):
    """Take a tile [BLOCK_D, STEPS] apart into STEPS vectors [BLOCK_D] in the order of state tiles."""
    if STEPS == 1:
        steps = (by_thread(tl.reshape(b_x, [BLOCK_D]), BLOCK_D),)
    else:
        b_even, b_odd = tl.split(tl.reshape(b_x, [BLOCK_D, STEPS // 2, 2]))
        even = steps_of(b_even, BLOCK_D, STEPS // 2)
        odd = steps_of(b_odd, BLOCK_D, STEPS // 2)
        steps = ()
        for i in tl.static_range(STEPS // 2):
            steps = steps + (even[i], odd[i])
    return steps


@triton.jit
def computed(b_x, b_y):
    """Return both tiles as they are, computed where they were loaded.

    Triton 3.6 would rather convert the 16-bit values they come from to the layout of the states, four threads to a
    channel, and have each of the four compute the rest; but not where two come from different ones.
    """
    return tl.split(tl.join(b_x, b_y))


@triton.jit
def tile_of(steps, BLOCK_D: tl.constexpr, STEPS: tl.constexpr):
    """Put STEPS vectors [BLOCK_D] in the order of state tiles together into a tile [BLOCK_D, STEPS]."""
    if STEPS == 1:
        b_x = tl.reshape(by_channel(steps[0], BLOCK_D), [BLOCK_D, 1])
    else:
        b_even = tile_of(steps[0::2], BLOCK_D, STEPS // 2)
        b_odd = tile_of(steps[1::2], BLOCK_D, STEPS // 2)
        b_x = tl.reshape(tl.join(b_even, b_odd), [BLOCK_D, STEPS])
    return b_x


@triton.jit
def tile_pointers(x_ptr, i_b, i_d, o_d, stride_batch, stride_dim, stride_time, STEPS: tl.constexpr):
    """Point at the first STEPS steps of the channels i_d + o_d, [BLOCK_D, STEPS]."""
    p_x = x_ptr + tl.cast(i_b, tl.int64) * stride_batch + i_d * stride_dim
    return p_x + tl.cast(o_d, tl.int64)[:, None] * stride_dim + tl.arange(0, STEPS)[None, :] * stride_time


@triton.jit
def load_tile(p_x, t, stride_time, mask):
    """Read the steps from t on in float32."""
    return tl.load(p_x + tl.cast(t, tl.int64) * stride_time, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p_x, t, stride_time, b_x, mask):
    """Write the steps from t on, rounded to the dtype of the tensor."""
    tl.store(p_x + tl.cast(t, tl.int64) * stride_time, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def states_if(condition, o_n, DSTATE: tl.constexpr):
    """Return the mask of the states where the condition holds, and of none where it does not."""
    return o_n < tl.where(condition, DSTATE, 0)


@triton.jit
def sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp2(b_x * -LOG2E))


@triton.jit
def softplus(b_x):
    """Return max(x, 0) + log1p(e) with e = exp(-|x|), and e.

    log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1 / 3, whose odd series converges fast: five coefficients leave a
    relative error of 4e-9, at a third of the cost of a logarithm that is exact near 1.
    """
    b_e = tl.exp2(tl.abs(b_x) * -LOG2E)
    b_s = b_e / (2.0 + b_e)
    b_s2 = b_s * b_s
    b_series = 0.279614180 + 0.281746566 * b_s2
    b_series = 0.400248528 + b_series * b_s2
    b_series = 0.666663170 + b_series * b_s2
    b_series = 2.0 + b_series * b_s2
    return tl.maximum(b_x, 0.0) + b_series * b_s, b_e


@triton.jit
def load_delta(p_delta, t, stride_time, mask, b_bias, DELTA_SOFTPLUS: tl.constexpr):
    """Read the steps' sizes, and their slopes by what was read. Steps past the end have size 0: they change nothing."""
    b_delta = load_tile(p_delta, t, stride_time, mask) + b_bias[:, None]
    b_slope = tl.full(b_delta.shape, 1.0, tl.float32)
    if DELTA_SOFTPLUS:
        b_raw = b_delta
        b_delta, b_e = softplus(b_raw)
        b_slope = tl.where(b_raw < 0.0, b_e, 1.0) / (1.0 + b_e)
    return tl.where(mask, b_delta, 0.0), b_slope


@triton.jit
def load_parameter(x_ptr, offset, offsets, mask):
    """Read a parameter, zero where it is None."""
    if x_ptr is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(x_ptr + offset + offsets, mask=mask, other=0.0)

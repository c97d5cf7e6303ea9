"""How many exponentials a GPU computes in a second: the bound of a scan that is measured beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 8 independent chains to a thread, so that the special-function units never wait for a result
BLOCK, NUM_WARPS = 1024, 4
UNROLL = 16


@triton.jit
def exp2_rate_kernel(out_ptr, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK], stays between 0 and 1
    b_x = o.to(tl.float32) * 1e-9
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            b_x = tl.exp2(-b_x)
    tl.store(out_ptr + o, b_x)


def exp2_many(device: str = "cuda", rounds: int = 256, programs: int | None = None) -> int:
    """Compute exponentials on the whole of a GPU.

    Args:
        device: where.
        rounds: of UNROLL exponentials, one after the other, for each element.
        programs: of BLOCK elements; by default 16 for each multiprocessor.

    Returns:
        How many.
    """
    if programs is None:
        programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * BLOCK, device=device)
    exp2_rate_kernel[(programs,)](out, rounds, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=NUM_WARPS)
    return out.numel() * rounds * UNROLL

"""16-bit tensors are read exactly, and results rounded to the nearest one as PyTorch rounds."""

import pytest
import torch

from ssmtune.ops import causal_conv1d, selective_scan

DTYPES = (torch.bfloat16, torch.float16)


def every_value(dtype, layout, step=1):
    """Return all 65536 of them as (1, 16, 4096), or those a step apart."""
    values = torch.arange(-(2**15), 2**15, step).to(torch.int16).view(dtype).view(1, -1, 16).transpose(1, 2)
    return values if layout == "last" else values.contiguous()


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_survives(backend, dtype, layout):
    x = every_value(dtype, layout)
    out = causal_conv1d(x, torch.ones(16, 1), backend=backend)
    # the kernels take a float32 below its normal range for zero
    tiny = (x.abs().float() < 2**-126) & (x != 0)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan() & ~tiny], x[~x.isnan() & ~tiny])
    assert (out[tiny].abs() <= x[tiny].abs()).all()


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_to_nearest(backend, dtype, layout):
    # Triton's interpreter takes milliseconds for a step: of 4096 of them it gets 241, with values from everywhere
    u = every_value(dtype, layout, step=17 if backend == "triton" else 1)
    u = torch.where(u.isfinite(), u, 0)
    # out is D u alone; among the factors are some that leave a value exactly between two others
    D = torch.tensor([1, 1 + 2**-8, 1 + 2**-11, 1 + 2**-8 + 2**-20, 1.5, -1.25, 2**-9, 3 * 2**-12, *torch.randn(8)])
    zeros = torch.zeros(1, 4, u.shape[2], dtype=dtype)
    out = selective_scan(u, torch.zeros_like(u), -torch.ones(16, 4), zeros, zeros, D, backend=backend)
    exact = D[:, None] * u.float()
    expected = exact.to(dtype)
    normal = (exact.abs() >= 2**-126) | (exact == 0)
    assert torch.equal(out[normal], expected[normal])
    assert (out[~normal].abs() <= expected[~normal].abs()).all()

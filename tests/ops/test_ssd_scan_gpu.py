"""Mamba-2's scan on a GPU, in sizes past what an interpreter can do."""

import pytest
import torch
from ssd_inputs import compare, compare_packed, draw, run

pytestmark = pytest.mark.gpu


def on_gpu(*args, **kwargs):
    return {name: x.cuda() for name, x in draw(*args, **kwargs).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1), (2, 130, 3, 33, 1, 20), (2, 300, 6, 64, 2, 128), (1, 1030, 24, 64, 1, 128)], ids=str
)
def test_equals_the_recurrence(sizes, dtype):
    compare(on_gpu(*sizes, dtype=dtype), "triton", dtype)


@pytest.mark.parametrize("per_row", [True, False], ids=["per-sequence", "shared"])
def test_packed_sequences(per_row):
    bounds = torch.tensor([0, 1, 70, 198, 1000, 1024], device="cuda")
    inputs = on_gpu(1, 1024, 4, 64, 2, 64, per_row=per_row, rows=5)
    compare_packed(inputs, "triton", bounds)


def test_same_bits_every_time():
    inputs = {name: x.requires_grad_() for name, x in on_gpu(1, 2048, 24, 64, 1, 128, dtype=torch.bfloat16).items()}

    def results():
        out, states = run(inputs, backend="triton")
        return out, states, *torch.autograd.grad(out.float().square().sum() + states.sum(), list(inputs.values()))

    first = results()
    for _ in range(5):
        for name, a, b in zip(("out", "states", *inputs), first, results(), strict=True):
            assert torch.equal(a, b), name

"""The CUDA kernels of the convolution where their tiles meet, and in whatever order their threads run."""

import ctypes
import itertools

import emulated_cuda
import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import backends, causal_conv1d
from ssmtune.ops.reference import causal_conv1d_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, dim, seqlen, channels-last, lengths of packed sequences: more channels than a tile has, more steps; channels
# that cannot be read four at a time; one channel
CASES = {
    "channels": (2, 132, 37, True, None),
    "steps": (2, 8, 519, True, None),
    "odd-channels": (1, 35, 300, True, None),
    "channels-first": (2, 9, 487, False, None),
    "packed": (1, 8, 600, True, (1, 254, 2, 3, 257, 83)),
    "packed-channels-first": (1, 9, 520, False, (463, 1, 2, 54)),
    "one-channel": (3, 1, 40, True, None),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda-emulated", emulated_cuda.backend())
    yield
    emulated_cuda.library().set_order(0)


def make(batch, dim, seqlen, channels_last, lengths, dtype=torch.float32):
    x = torch.randn(batch, seqlen, dim).transpose(1, 2)
    rows = batch if lengths is None else len(lengths)
    inputs = {
        "x": (x if channels_last else x.contiguous()).to(dtype),
        "weight": torch.randn(dim, 4),
        "bias": torch.randn(dim),
        "initial_states": torch.randn(rows, dim, 3),
    }
    return inputs, None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)])


def run(conv, inputs, cu_seqlens, dtype=None, **options):
    inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    results = conv(**inputs, activation="silu", cu_seqlens=cu_seqlens, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), weights)
    names = ("out", "final_states", *(f"d{name}" for name in inputs))
    return dict(zip(names, (*results, *gradients), strict=True))


def emulate(inputs, cu_seqlens):
    return run(causal_conv1d, inputs, cu_seqlens, return_final_states=True, backend="cuda-emulated")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_causal_conv1d(case, dtype, poison_empty):
    inputs, cu_seqlens = make(*CASES[case], dtype=dtype)
    exact = run(causal_conv1d_reference, inputs, cu_seqlens, torch.float64)
    single = run(causal_conv1d_reference, inputs, cu_seqlens, torch.float32)
    actual = emulate(inputs, cu_seqlens)
    for name, value in actual.items():
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6)
        if value.dtype in (torch.bfloat16, torch.float16):
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_change_a_bit(case):
    inputs, cu_seqlens = make(*CASES[case])
    before = emulate(inputs, cu_seqlens)
    for order in (1, 2, 3):
        emulated_cuda.library().set_order(order)
        after = emulate(inputs, cu_seqlens)
        assert all(torch.equal(before[name], after[name]) for name in before), order


@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("initial_states",)], ids="-".join)
@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "first"])
def test_gradients_that_are_not_asked_for_are_not_needed(trained, channels_last):
    inputs, _ = make(2, 12, 70, channels_last, None)
    expected = emulate(inputs, None)
    given = {name: x.requires_grad_(name in trained) for name, x in inputs.items()}
    results = causal_conv1d(**given, activation="silu", return_final_states=True, backend="cuda-emulated")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results]
    (name,) = trained
    reached = [(x, weight) for x, weight in zip(results, weights, strict=True) if x.requires_grad]
    torch.autograd.backward(*zip(*reached, strict=True))
    assert torch.equal(given[name].grad, expected[f"d{name}"])


def conv_tiles(backward, channels_last, *sizes):
    tiles = (ctypes.c_int64 * 5)()
    emulated_cuda.library().conv_tiles(backward, channels_last, *map(ctypes.c_int64, sizes), tiles)
    return dict(zip(("vector", "channels", "steps", "blocks", "shares"), tiles, strict=True))


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 36, 1000), (5, 4096, 2**18), (2**16, 65536, 4), (1, 4, 2**33)], ids=str
)
def test_tiles_cover_tensors_of_any_size(backward, channels_last, sizes):
    tiles = conv_tiles(backward, channels_last, *sizes)
    batch, dim, seqlen = sizes
    assert tiles["vector"] == (0 if not channels_last else 4 if dim % 4 == 0 else 1)
    steps = -(-seqlen // tiles["steps"])
    assert tiles["blocks"] == batch * steps * -(-dim // tiles["channels"])
    assert tiles["shares"] == batch * steps


def test_positions_past_32_bits():
    offset = emulated_cuda.library().conv_offset
    offset.restype = ctypes.c_int64
    batch_stride, stride, batch, channel, step = 3 * 2**32, 2**17, 5, 7, 2**20 - 1
    place = [ctypes.c_int64(value) for value in (batch_stride, stride, batch, channel, step)]
    assert offset(True, *place) == batch * batch_stride + step * stride + channel
    assert offset(False, *place) == batch * batch_stride + channel * stride + step

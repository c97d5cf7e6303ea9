"""The package causal_conv1d as a backend, with a stand-in that records how it is called."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import ssmtune
from ssmtune import native
from ssmtune.ops import backends, causal_conv1d_package, cuda
from ssmtune.ops.causal_conv1d_package import why_not, why_not_update

CUDA = torch.device("cuda")


@pytest.fixture
def package(monkeypatch):
    """A module with the functions of the package, which remembers their arguments; and a GPU to run them."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return "result"

    module = SimpleNamespace(causal_conv1d_fn=record, causal_conv1d_update=record, calls=calls)
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def last(x):
    return x.mT.contiguous().mT


def test_arguments_of_the_package(package):
    x, weight, bias = last(torch.randn(2, 16, 9)).bfloat16(), torch.randn(16, 4), torch.randn(16).double()
    states = torch.randn(2, 16, 3)
    assert causal_conv1d_package.causal_conv1d(x, weight, bias, states, None, True, True) == "result"
    (args, kwargs), *_ = package.calls
    assert args[0] is x and args[1] is weight
    assert args[2].dtype == weight.dtype and torch.equal(args[2], bias.float())
    given = kwargs.pop("initial_states")
    assert given.stride(1) == 1 and torch.equal(given, states.bfloat16())
    assert kwargs == {"seq_idx": None, "return_final_states": True, "activation": "silu"}


def test_packed_sequences_are_numbered(package):
    x, weight = last(torch.randn(1, 16, 9)), torch.randn(16, 4)
    causal_conv1d_package.causal_conv1d(x, weight, None, None, torch.tensor([0, 2, 9]), False, False)
    (args, kwargs), *_ = package.calls
    assert args[2] is None and kwargs["activation"] is None
    expected = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    assert kwargs["seq_idx"].dtype == torch.int32 and torch.equal(kwargs["seq_idx"], expected)
    with pytest.raises(ValueError, match="cu_seqlens ends with 8"):
        causal_conv1d_package.causal_conv1d(x, weight, None, None, torch.tensor([0, 2, 8]), False, False)


def test_update(package):
    x, state, weight = torch.randn(2, 16), torch.randn(2, 16, 3), torch.randn(16, 4).half()
    assert causal_conv1d_package.causal_conv1d_update(x, state, weight, torch.randn(16), True) == "result"
    (args, kwargs), *_ = package.calls
    assert args[0] is x and args[1] is state and args[2] is weight and args[3].dtype == torch.float16
    assert kwargs == {"activation": "silu"}


def test_calls_that_fit(package):
    x, weight, states, bounds = torch.randn(1, 16, 9), torch.randn(16, 4), torch.randn(1, 16, 3), torch.tensor([0, 9])
    assert why_not(x, weight, None, False, None) is None
    assert why_not(torch.randn(1, 17, 9), torch.randn(17, 2), None, False, None) is None
    for arguments in ((states, False, None), (None, True, None), (states, True, None), (None, False, bounds)):
        assert why_not(last(x), weight, *arguments) is None
        assert "in channels-last memory only" in why_not(x, weight, *arguments)
    assert why_not_update(x[:, :, 0], states, weight) is None


def test_calls_that_do_not_fit(package):
    x, weight, states, bounds = torch.randn(1, 16, 9), torch.randn(16, 4), torch.randn(1, 16, 3), torch.tensor([0, 9])
    for width in (1, 5):
        assert f"widths of 2 to 4, got {width}" in why_not(x, torch.randn(16, width), None, False, None)
        assert f"got {width}" in why_not_update(x[:, :, 0], states, torch.randn(16, width))
    assert "float16, got torch.float64" in why_not(x, weight.double(), None, False, None)
    assert "multiples of 8 channels, got 12" in why_not(last(x[:, :12]), weight[:12], None, False, None)
    for arguments in ((states, False, bounds), (None, True, bounds)):
        assert "no states of packed sequences" in why_not(last(x), weight, *arguments)
    assert "3 steps or more, got 2" in why_not(last(x[:, :, :2]), weight, None, True, None)
    assert "in the dtype of x, torch.bfloat16, got torch.float32" in why_not_update(
        x[:, :, 0].bfloat16(), states, weight
    )


def test_choice(package):
    for op in ("causal_conv1d", "causal_conv1d_update"):
        assert ssmtune.available_backends(op)["cuda"] is None
        assert backends.choose(op, CUDA, torch.bfloat16) == "cuda"
        assert backends.choose(op, CUDA, torch.bfloat16, None, {"cuda": None}) == "cuda"
        instead = "triton" if find_spec("triton") else "reference"
        assert backends.choose(op, CUDA, torch.bfloat16, None, {"cuda": "no room"}) == instead
        assert backends.choose(op, CUDA, torch.float64) == "reference"
        with pytest.raises(RuntimeError, match="backend 'cuda' was requested but cannot run: no room."):
            backends.choose(op, CUDA, torch.float32, "cuda", {"cuda": "no room"})
        with pytest.raises(RuntimeError, match="take tensors on cuda, got tensors on cpu"):
            backends.choose(op, torch.device("cpu"), torch.float32, "cuda")


@pytest.fixture
def no_package(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    monkeypatch.setattr(causal_conv1d_package, "_is_found", lambda: False)


def test_without_the_package(no_package, monkeypatch):
    monkeypatch.setattr(native, "_cuda_reason", "not built: ssmtune/_C_cuda.so is missing\n  Install nvcc.")
    x, weight, instead = torch.randn(1, 16, 9), torch.randn(16, 4), "triton" if find_spec("triton") else "reference"
    for op in ("causal_conv1d", "causal_conv1d_update"):
        assert ssmtune.available_backends(op)["cuda"].startswith("not built: ssmtune/_C_cuda.so is missing")
        assert backends.choose(op, CUDA, torch.float32) == instead
        with pytest.raises(RuntimeError, match="cannot run: not built: ssmtune/_C_cuda.so is missing\n  Install nvcc"):
            backends.choose(op, CUDA, torch.float32, "cuda")
    expected = "the package causal_conv1d is not installed; not built: ssmtune/_C_cuda.so is missing"
    assert cuda.why_not_conv(why_not(x, weight, None, False, None), 4).startswith(expected)
    assert cuda.why_not_conv_update(why_not_update(x[:, :, 0], x[:, :, :3], weight)).startswith(expected)


def test_kernels_take_what_the_package_does_not(no_package, monkeypatch):
    monkeypatch.setattr(native, "_cuda_loaded", True)
    monkeypatch.setattr(native, "_cuda_reason", None)
    assert backends.choose("causal_conv1d", CUDA, torch.float32) == "cuda"
    assert cuda.why_not_conv("no room", 4) is None and cuda.why_not_conv_update("no room") is None
    assert cuda.why_not_conv("no room", 5) == "no room; the CUDA kernels take filters of width 4 at most, got 5"
    assert cuda.why_not_conv(None, 5) is None


@pytest.mark.gpu
def test_package_on_a_gpu():
    pytest.importorskip("causal_conv1d")
    x = last(torch.randn(2, 64, 50, device="cuda")).requires_grad_()
    weight, bias = torch.randn(64, 4, device="cuda"), torch.randn(64, device="cuda")
    results = []
    for name in ("cuda", "reference"):
        out, states = ssmtune.causal_conv1d(x, weight, bias, activation="silu", return_final_states=True, backend=name)
        (gradient,) = torch.autograd.grad(out.sum() + 2 * states.sum(), x)
        results.append((out, states, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

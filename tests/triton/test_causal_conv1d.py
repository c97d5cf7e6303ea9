"""What is peculiar to the Triton kernels of the convolution; tests/ops holds them to the reference like all others."""

import itertools

import pytest
import torch

from ssmtune.ops import causal_conv1d, causal_conv1d_update
from ssmtune.ops.reference import causal_conv1d_reference

pytest.importorskip("triton")

from ssmtune.triton_kernels import causal_conv1d as kernels  # noqa: E402

NAMES = ("x", "weight", "bias", "initial_states")
RATIOS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def make(batch, dim, seqlen, *, layout="last", dtype=torch.float32, lengths=None, device="cpu", width=4):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    x = normal(batch, seqlen, dim).to(dtype).transpose(1, 2)
    bounds = None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return {
        "x": x.contiguous() if layout == "first" else x,
        "weight": normal(dim, width),
        "bias": normal(dim),
        "initial_states": normal(len(lengths or range(batch)), dim, width - 1),
        "cu_seqlens": bounds,
    }


def run(inputs, conv=causal_conv1d, dtype=None, **options):
    inputs = {
        name: tensor.to(dtype or tensor.dtype).detach().requires_grad_() if name in NAMES else tensor
        for name, tensor in inputs.items()
    }
    out, final_states = conv(**inputs, activation="silu", **options)
    # values that every dtype has
    weights = [
        torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).bfloat16() for y in (out, final_states)
    ]
    gradients = torch.autograd.grad(
        (out, final_states), [inputs[name] for name in NAMES], [w.to(out.dtype) for w in weights]
    )
    return dict(zip(("out", "final_states", *NAMES), (out, final_states, *gradients), strict=True))


def on_triton(inputs):
    return run(inputs, return_final_states=True, backend="triton")


@pytest.fixture
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")


@pytest.mark.parametrize("lengths", [None, [150, 1, 70, 2, 64, 13]], ids=["rows", "packed"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_programs_of_many_tiles(layout, lengths, interpreter, monkeypatch, assert_close):
    inputs = make(3 if lengths is None else 1, 7, 300, layout=layout, lengths=lengths)
    expected = on_triton(inputs)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    # the sums are taken in another order
    for name, value in on_triton(inputs).items():
        assert_close(name, expected[name], value, 1e-6 if name in ("weight", "bias") else 0)


@pytest.mark.parametrize(
    "dim, seqlen, layout",
    [
        (130, 32, "last"),
        (130, 33, "last"),
        (130, 34, "last"),
        (130, 67, "last"),
        (1, 1025, "first"),
        (1, 1026, "first"),
    ],
)
def test_states_of_two_tiles(dim, seqlen, layout, interpreter, poison_empty, assert_close):
    inputs = make(1, dim, seqlen, layout=layout)
    expected = run(inputs, causal_conv1d_reference, torch.float64)
    for name, value in on_triton(inputs).items():
        assert_close(name, expected[name], value, RATIOS[torch.float32])


def test_wide_filters_are_refused(interpreter):
    with pytest.raises(RuntimeError, match="'triton' was requested but cannot run: .* widths up to 8, got 9"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 9), backend="triton")
    with pytest.raises(RuntimeError, match="widths up to 8, got 9"):
        causal_conv1d_update(torch.ones(1, 2), torch.ones(1, 2, 8), torch.ones(2, 9), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("lengths", [None, [1000, 1, 3, 2049, 5139]], ids=["rows", "packed"])
@pytest.mark.parametrize("dim", [1536, 1001])
def test_large_shapes(dim, lengths, layout, dtype, assert_close):
    batch, seqlen = (4, 2048) if lengths is None else (1, sum(lengths))
    inputs = make(batch, dim, seqlen, layout=layout, dtype=dtype, lengths=lengths, device="cuda")
    expected = run(inputs, causal_conv1d_reference, torch.float64)
    actual = on_triton(inputs)
    for name, value in actual.items():
        assert_close(name, expected[name], value, RATIOS[dtype])
    # the same bits again
    for name, value in on_triton(inputs).items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["first", "last"])
def test_more_elements_than_32_bits_count(layout, assert_close):
    shape = (2048, 2**20 + 2**18) if layout == "first" else (2**20 + 2**18, 2048)
    x = torch.empty(1, *shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = x if layout == "first" else x.transpose(1, 2)
    weight = torch.randn(2048, 4, device="cuda")
    out = causal_conv1d(x, weight, activation="silu", backend="triton")
    expected = causal_conv1d_reference(x[:, -8:, -103:].float(), weight[-8:], activation="silu")[0]
    assert_close("end", expected[:, :, 3:], out[:, -8:, -100:], RATIOS[torch.bfloat16])

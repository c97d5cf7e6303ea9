"""causal_conv1d against the same sum in float64, and against the convolution of PyTorch."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close, error_ratio

from ssmtune.ops import causal_conv1d
from ssmtune.ops.reference import causal_conv1d_reference


def make(batch, dim, seqlen, width, *, layout="last", dtype=torch.float32, bias=True, initial=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(batch, seqlen, dim).transpose(1, 2).to(dtype)
    if layout == "first":
        x = x.contiguous()
    elif layout == "odd":
        x = torch.zeros(batch, 2 * dim, 3 * seqlen, dtype=dtype)[:, ::2, ::3].copy_(x)
    elif layout == "strided":
        # the first half of a projection
        x = torch.cat([x, x], dim=1)[:, :dim] if seqlen % 2 else torch.cat([x.mT, x.mT], dim=2).mT[:, :dim]
    return {
        "x": x,
        "weight": normal(dim, width),
        "bias": normal(dim) if bias else None,
        "initial_states": normal(batch, dim, width - 1) if initial else None,
    }


def run(conv, inputs, dtype=None, seed=0, final=True, cu_seqlens=None, **kwargs):
    """Return the results and all gradients; the reference always returns final states."""
    inputs = {
        name: None if x is None else (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for name, x in inputs.items()
    }
    if conv is causal_conv1d:
        kwargs["return_final_states"] = final
    results = conv(**inputs, cu_seqlens=cu_seqlens, **kwargs)
    results = dict(zip(("out", "final_states"), results if isinstance(results, tuple) else (results,), strict=False))
    if not final:
        results.pop("final_states", None)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results.values()]
    given = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(list(results.values()), list(given.values()), weights)
    return {name: x.detach() for name, x in results.items()} | {
        f"d{name}": g for name, g in zip(given, gradients, strict=True)
    }


def check(inputs, final, backend, **kwargs):
    """Hold results and gradients to the reference in float64; the error may be 4 times its own in float32."""
    skip_wide_filters(backend, inputs["weight"].shape[1])
    exact = run(causal_conv1d_reference, inputs, torch.float64, final=final, **kwargs)
    single = run(causal_conv1d_reference, inputs, torch.float32, final=final, **kwargs)
    actual = run(causal_conv1d, inputs, final=final, backend=backend, **kwargs)
    assert actual.keys() == exact.keys()
    assert actual["out"].dtype == inputs["x"].dtype
    for name, value in actual.items():
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6)
        if value.dtype in (torch.bfloat16, torch.float16):
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


def skip_wide_filters(backend, width):
    if backend == "cuda-emulated" and width > 4:
        pytest.skip("the CUDA kernels take filters of width 4 at most")


def cases():
    chance = random.Random(0)
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
    for seed, (width, activation) in enumerate(itertools.product((1, 2, 3, 4, 4, 5, 6, 7), (None, "silu", "swish"))):
        sizes = chance.choice((1, 2, 3)), chance.choice((1, 7, 16, 33)), chance.choice((1, 2, 3, 17, 64, 129)), width
        flags = {
            "layout": chance.choice(("first", "last", "odd", "strided")),
            "dtype": chance.choice(dtypes),
            "bias": chance.random() < 0.7,
            "initial": chance.random() < 0.6,
            "seed": seed,
        }
        words = "-".join(str(value) for value in flags.values())
        yield pytest.param(sizes, flags, activation, id="-".join([*map(str, sizes), words, str(activation)]))


@pytest.mark.parametrize("sizes, flags, activation", cases())
def test_causal_conv1d(sizes, flags, activation, backend, poison_empty):
    inputs = make(*sizes, **flags)
    check(inputs, flags["seed"] % 3 > 0, backend, activation=activation)


def packed_cases():
    chance = random.Random(1)
    for seed, width in enumerate((1, 2, 3, 4, 4, 4, 5, 6)):
        lengths = [chance.choice((1, 1, 2, 3, 5, 17, 63, 64, 65, 130)) for _ in range(chance.choice((1, 2, 4, 9)))]
        flags = {
            "layout": ("first", "last", "odd", "strided")[seed % 4],
            "dtype": (torch.float32, torch.bfloat16, torch.float32, torch.float16)[seed % 4],
            "bias": seed % 3 > 0,
            "seed": seed,
        }
        words = "-".join(str(value) for value in flags.values())
        yield pytest.param(lengths, chance.choice((1, 7, 16, 33)), width, flags, id=f"{lengths}-{width}-{words}")


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-states"])
@pytest.mark.parametrize("lengths, dim, width, flags", packed_cases())
def test_packed_sequences(lengths, dim, width, flags, initial, backend, poison_empty):
    inputs = make(1, dim, sum(lengths), width, initial=False, **flags)
    if initial:
        inputs["initial_states"] = torch.randn(len(lengths), dim, width - 1)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=(torch.int32, torch.int64)[width % 2])
    check(inputs, flags["seed"] % 4 > 0, backend, activation="silu" if width % 2 else None, cu_seqlens=cu_seqlens)


# Rows of 522 steps are cut in four pieces of time, at 130, 261 and 391: sequences end at a cut and right beside it.
@pytest.mark.parametrize("lengths", [[522], [129, 3, 1, 127, 1, 2, 126, 3, 130]], ids=["alone", "packed"])
@pytest.mark.parametrize(
    "width, dtype", [(4, torch.float32), (3, torch.bfloat16), (2, torch.float16), (40, torch.float32)]
)
def test_long_rows(lengths, width, dtype, backend, poison_empty):
    if backend == "triton" and width > 8:
        pytest.skip("the Triton kernels unroll the filter")
    inputs = make(1, 37, sum(lengths), width, dtype=dtype, layout="strided", initial=False)
    inputs["initial_states"] = torch.randn(len(lengths), 37, width - 1)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]) if len(lengths) > 1 else None
    check(inputs, True, backend, activation="silu", cu_seqlens=cu_seqlens)


def test_packing_changes_nothing(backend):
    inputs = make(1, 20, 75, 4, initial=False)
    states = torch.randn(3, 20, 3)
    cu_seqlens = torch.tensor([0, 2, 40, 75])
    whole = causal_conv1d(
        **inputs | {"initial_states": states},
        return_final_states=True,
        activation="silu",
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    alone = [
        causal_conv1d(
            **inputs | {"x": inputs["x"][:, :, start:stop], "initial_states": states[i : i + 1]},
            return_final_states=True,
            activation="silu",
            backend=backend,
        )
        for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
    ]
    assert torch.equal(whole[0], torch.cat([out for out, _ in alone], dim=2))
    assert torch.equal(whole[1], torch.cat([final for _, final in alone]))


def test_causal_conv1d_of_torch(backend):
    inputs = make(2, 16, 50, 4, initial=False)
    expected = F.conv1d(inputs["x"], inputs["weight"][:, None], inputs["bias"], padding=3, groups=16)[:, :, :50]
    assert_close("out", expected, causal_conv1d(**inputs, backend=backend), 1e-6)
    assert_close("silu", F.silu(expected), causal_conv1d(**inputs, activation="silu", backend=backend), 1e-6)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d_gradcheck(activation, initial):
    inputs = make(2, 3, 5, 4, initial=initial)
    given = {name: x.double().requires_grad_() for name, x in inputs.items() if x is not None}

    def conv(*tensors):
        named = dict(zip(given, tensors, strict=True))
        return causal_conv1d(**named, activation=activation, return_final_states=True)

    assert torch.autograd.gradcheck(conv, tuple(given.values()))


@pytest.mark.parametrize("cut", [1, 2, 3, 30, 49])
def test_cutting_a_sequence_changes_nothing(backend, cut):
    inputs = {name: x.requires_grad_() for name, x in make(2, 16, 50, 4).items()}
    options = {"activation": "silu", "return_final_states": True, "backend": backend}
    whole, last = causal_conv1d(**inputs, **options)
    x, parameters = inputs["x"], (inputs["weight"], inputs["bias"])
    left, states = causal_conv1d(x[:, :, :cut], *parameters, initial_states=inputs["initial_states"], **options)
    right, states = causal_conv1d(x[:, :, cut:], *parameters, initial_states=states, **options)
    out = torch.cat([left, right], dim=2)
    assert_close("out", whole, out, 1e-6)
    assert torch.equal(last, states)
    weights = torch.randn_like(whole), torch.randn_like(last)
    for name, tensor in inputs.items():
        a, b = (
            torch.autograd.grad(results, tensor, weights, retain_graph=True)[0]
            for results in ((whole, last), (out, states))
        )
        assert_close(f"d{name}", a, b, 2e-6)


def test_final_states_alone_have_gradients(backend):
    inputs = {name: x.requires_grad_() for name, x in make(2, 16, 2, 4).items()}
    _, final_states = causal_conv1d(**inputs, activation="silu", return_final_states=True, backend=backend)
    weight = torch.randn_like(final_states)
    gradients = torch.autograd.grad(final_states, list(inputs.values()), weight)
    expected = [weight[:, :, 1:], torch.zeros(16, 4), torch.zeros(16), F.pad(weight[:, :, :1], (2, 0))]
    for gradient, value in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, value)


def test_zero_initial_states_change_nothing(backend):
    inputs = make(2, 16, 50, 4, initial=False)
    plain = causal_conv1d(**inputs, backend=backend)
    inputs["initial_states"] = torch.zeros(2, 16, 3)
    assert torch.equal(plain, causal_conv1d(**inputs, backend=backend))


@pytest.mark.parametrize("trained", [("x",), ("weight", "bias"), ("initial_states",)], ids="-".join)
def test_only_asked_gradients_are_computed(backend, trained, monkeypatch):
    from ssmtune.ops import backends

    module, asked = backends.implementation(backend), []
    kernel = module.causal_conv1d_backward
    monkeypatch.setattr(module, "causal_conv1d_backward", lambda *args: asked.extend(args[-1]) or kernel(*args))
    inputs = make(2, 16, 50, 4)
    for name in trained:
        inputs[name].requires_grad_()
    causal_conv1d(**inputs, activation="silu", backend=backend).sum().backward()
    assert {name for name, gradient in zip(inputs, asked, strict=True) if gradient is not None} == set(trained)
    assert {name for name, x in inputs.items() if x.grad is not None} == set(trained)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_layout_is_kept_and_nothing_copied(native_kernels, monkeypatch, layout):
    inputs = make(2, 16, 50, 4, layout=layout)
    kernel, seen = torch.ops.ssmtune_native.causal_conv1d_fwd, []
    monkeypatch.setattr(
        torch.ops.ssmtune_native, "causal_conv1d_fwd", lambda *args: seen.append(args[0].data_ptr()) or kernel(*args)
    )
    inputs["x"].requires_grad_()
    out = causal_conv1d(**inputs, activation="silu", backend="cpu")
    out.square().sum().backward()
    assert seen == [inputs["x"].data_ptr()]
    for x in (out, inputs["x"].grad):
        assert (x if layout == "first" else x.transpose(1, 2)).is_contiguous()


def test_threads_do_not_change_a_bit(native_kernels):
    def results(threads):
        torch.set_num_threads(threads)
        inputs, packed = make(3, 80, 300, 4), make(1, 80, 900, 4, initial=False)
        rows = run(causal_conv1d, inputs, activation="silu", backend="cpu")
        packed = run(causal_conv1d, packed, cu_seqlens=torch.tensor([0, 700, 703, 900]), backend="cpu")
        return rows | {f"packed {name}": x for name, x in packed.items()}

    before = torch.get_num_threads()
    try:
        one, two = results(1), results(2)
    finally:
        torch.set_num_threads(before)
    for name in one:
        assert torch.equal(one[name], two[name]), name

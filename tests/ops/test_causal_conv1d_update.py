"""causal_conv1d_update against the same sum in float64, and against the convolution of a whole sequence."""

import itertools

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import causal_conv1d, causal_conv1d_update, decoding
from ssmtune.ops.reference import causal_conv1d_update_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(batch, dim, width, *, dtype=torch.float32, state_dtype=None, bias=True, memory="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    state = normal(batch, dim, width - 1).to(state_dtype or dtype)
    x, weight = normal(batch, dim).to(dtype), normal(dim, width)
    if memory == "cache":
        # the last columns of a cache that holds one step more; the halves of a projection
        state = torch.zeros(batch, dim, width, dtype=state.dtype)[:, :, 1:].copy_(state)
        x = torch.cat([x, x], dim=1)[:, :dim]
        weight = weight[:, None].squeeze(1)
    elif memory == "transposed":
        state = torch.zeros(batch, width - 1, dim, dtype=state.dtype).transpose(1, 2).copy_(state)
        x = torch.zeros(dim, batch, dtype=dtype).T.copy_(x)
        weight = torch.zeros(width, dim).T.copy_(weight)
    elif memory == "half parameters":
        weight = weight.to(dtype)
    return {"x": x, "conv_state": state, "weight": weight, "bias": normal(dim).to(weight.dtype) if bias else None}


def run(update, inputs, dtype=None, **kwargs):
    if dtype is not None:
        inputs = {name: None if x is None else x.to(dtype, copy=True) for name, x in inputs.items()}
    return {"out": update(**inputs, **kwargs), "conv_state": inputs["conv_state"]}


def cases():
    kinds = itertools.cycle(("contiguous", "cache", "transposed", "half parameters"))
    sizes = itertools.cycle(((1, 1), (1, 33), (3, 7), (2, 16), (5, 64)))
    for seed, (width, dtype) in enumerate(itertools.product((1, 2, 3, 4, 5, 6), DTYPES)):
        flags = {"dtype": dtype, "bias": seed % 3 > 0, "memory": next(kinds), "seed": seed}
        flags["state_dtype"] = torch.float32 if seed % 5 == 0 else dtype
        words = [str(dtype), flags["memory"], "bias" if flags["bias"] else "no-bias"]
        yield pytest.param((*next(sizes), width), flags, (None, "silu")[seed % 2], id="-".join([str(width), *words]))


@pytest.mark.parametrize("sizes, flags, activation", cases())
@pytest.mark.parametrize("short", [True, False], ids=["direct", "operator"])
def test_causal_conv1d_update(sizes, flags, activation, short, backend, poison_empty):
    inputs = make(*sizes, **flags)
    exact = run(causal_conv1d_update_reference, inputs, torch.float64, activation=activation)
    single = run(causal_conv1d_update_reference, inputs, torch.float32, activation=activation)
    # with gradients recorded the call goes through the operator of PyTorch
    with torch.set_grad_enabled(not short):
        actual = run(causal_conv1d_update, inputs, activation=activation, backend=backend)
    assert actual["out"].dtype == flags["dtype"] and actual["conv_state"] is inputs["conv_state"]
    for name, value in actual.items():
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6)
        if value.dtype in (torch.bfloat16, torch.float16):
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


def test_float64_around_a_narrower_input(backend):
    inputs = make(2, 20, 4, dtype=torch.bfloat16)
    expected = run(causal_conv1d_update, inputs | {"conv_state": inputs["conv_state"].float()}, backend=backend)
    wide = {name: x if name == "x" else x.double() for name, x in inputs.items()}
    actual = run(causal_conv1d_update, wide, backend=backend)
    assert actual["out"].dtype == torch.bfloat16 and torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["conv_state"], expected["conv_state"].double())


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_steps_are_the_whole_sequence(backend, width):
    if backend == "cuda-emulated" and width > 4:
        pytest.skip("the CUDA kernels of a sequence take filters of width 4 at most")
    x, state = torch.randn(2, 20, 9), torch.randn(2, 20, width - 1)
    parameters = torch.randn(20, width), torch.randn(20)
    options = {"activation": "silu", "backend": backend}
    expected, last = causal_conv1d(x, *parameters, initial_states=state, return_final_states=True, **options)
    steps = [causal_conv1d_update(x_t, state, *parameters, **options) for x_t in x.unbind(2)]
    assert_close("out", expected, torch.stack(steps, dim=2), 1e-6)
    assert torch.equal(state, last)


def test_only_the_state_is_written(backend):
    inputs = make(2, 20, 4)
    cache = torch.full((3, 2, 20, 4), float("inf"))
    inputs["conv_state"] = cache[1, :, :, 1:].copy_(inputs["conv_state"])
    before = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad():
        causal_conv1d_update(**inputs, backend=backend)
    assert cache[0].isinf().all() and cache[2].isinf().all() and cache[1, :, :, 0].isinf().all()
    assert torch.equal(cache[1, :, :, -1], inputs["x"])
    assert all(torch.equal(inputs[name], before[name]) for name in ("x", "weight", "bias"))


def test_fitting_calls_go_straight_to_the_kernel(native_kernels, monkeypatch):
    from ssmtune.ops import selective_state_update

    def unexpected(*args):
        raise AssertionError("took the long way")

    monkeypatch.setattr("ssmtune.ops.arguments.check_tensors", unexpected)
    ones = torch.ones
    with torch.no_grad():
        for memory in ("contiguous", "cache", "transposed"):
            causal_conv1d_update(**make(2, 20, 4, memory=memory, dtype=torch.bfloat16))
        for state in (ones(2, 6, 4), ones(2, 6, 4).bfloat16(), ones(2, 4, 6).mT):
            selective_state_update(state, ones(2, 6), ones(2, 6), -ones(6, 4), ones(2, 4), ones(2, 4), ones(6).half())


WRONG = [
    ({"x": [1.0]}, TypeError, ["x is of type list"]),
    ({"x": torch.ones(2, 20, 1)}, ValueError, ["x has shape (2, 20, 1)", "(batch, dim)"]),
    ({"x": torch.ones(2, 20).int()}, TypeError, ["x has dtype torch.int32"]),
    ({"conv_state": None}, TypeError, ["conv_state is of type NoneType"]),
    ({"conv_state": torch.ones(2, 20, 4)}, ValueError, ["conv_state has shape (2, 20, 4)", "= (2, 20, 3)"]),
    ({"conv_state": torch.ones(2, 1, 3).expand(2, 20, 3)}, ValueError, ["conv_state of shape", "conv_state.clone()"]),
    ({"weight": torch.ones(20, 0)}, ValueError, ["width is 0"]),
    ({"weight": torch.ones(21, 4)}, ValueError, ["weight has shape (21, 4)", "(dim, width) = (20, 4)"]),
    ({"bias": torch.ones(20, 1)}, ValueError, ["bias has shape (20, 1)", "(dim,) = (20,)"]),
    ({"bias": torch.ones(20, device="meta")}, ValueError, ["bias is on meta, but x is on cpu"]),
    ({"bias": torch.ones(20).to_sparse()}, TypeError, ["bias has layout torch.sparse_coo", "bias.to_dense()"]),
    ({"activation": "relu"}, ValueError, ["there is no activation 'relu'"]),
    ({"backend": "cpus"}, ValueError, ["there is no backend 'cpus'; did you mean 'cpu'?"]),
    ({"backend": ["cpu"]}, ValueError, ["there is no backend ['cpu']"]),
]


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("wrong, error, parts", WRONG)
def test_wrong_arguments(wrong, error, parts, recorded):
    inputs = make(2, 20, 4)
    state = inputs["conv_state"].clone()
    with torch.set_grad_enabled(recorded), pytest.raises(error) as caught:
        causal_conv1d_update(**inputs | wrong)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert str(caught.value).count("\n") in (1, 2)
    assert torch.equal(inputs["conv_state"], state)


@pytest.mark.parametrize("name", ["x", "conv_state", "weight"])
def test_gradients_are_refused(name):
    inputs = make(2, 20, 4)
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires a gradient, but the update has none") as error:
        causal_conv1d_update(**inputs)
    assert "initial_states=conv_state and return_final_states=True" in str(error.value)
    with torch.no_grad():
        causal_conv1d_update(**inputs)


def test_float64_runs_on_the_reference():
    inputs = make(2, 20, 4, dtype=torch.float64)
    with torch.no_grad():
        assert run(causal_conv1d_update, inputs)["out"].dtype == torch.float64
        with pytest.raises(RuntimeError, match="got float64"):
            causal_conv1d_update(**inputs, backend="cpu")


def test_opcheck_and_compile(backend):
    inputs = make(2, 20, 4)
    results = torch.library.opcheck(torch.ops.ssmtune.causal_conv1d_update, (*inputs.values(), True, backend))
    assert set(results.values()) == {"SUCCESS"}, results

    expected = run(causal_conv1d_update, inputs, torch.float32, activation="silu", backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda inputs: causal_conv1d_update(**inputs, activation="silu", backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(inputs), expected["out"])
    torch.testing.assert_close(inputs["conv_state"], expected["conv_state"])


def test_threads_do_not_change_a_bit(native_kernels):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(causal_conv1d_update, make(16, 2048, 4), activation="silu", backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_call_directly_leaves_what_does_not_fit():
    with torch.no_grad():
        assert decoding.call_directly("causal_conv1d_update", "x", None, ()) is None
        assert decoding.call_directly("causal_conv1d_update", torch.ones(2, 3).double(), None, ()) is None
        assert decoding.call_directly("causal_conv1d_update", torch.ones(2, 3), "reference", ()) is None

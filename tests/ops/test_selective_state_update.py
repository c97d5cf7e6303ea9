"""selective_state_update against one step of the recurrence in float64."""

import random

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import selective_state_update
from ssmtune.ops.reference import selective_state_update_reference

OPTIONAL = ("D", "z", "dt_bias", "state_offset", "output_offset")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("native_kernels")
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


def make(batch, dim, dstate, *, dtype=torch.float32, optional=OPTIONAL, per_row=False, softplus=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = (batch,) if per_row else ()
    values = {
        "state": normal(batch, dim, dstate),
        "x": normal(batch, dim).to(dtype),
        "dt": (normal(batch, dim) - 1 if softplus else normal(batch, dim).exp()).to(dtype),
        "A": -normal(dim, dstate).exp(),
        "B": normal(batch, dstate).to(dtype),
        "C": normal(batch, dstate).to(dtype),
        "D": normal(dim),
        "z": normal(batch, dim).to(dtype),
        "dt_bias": normal(dim) if softplus else normal(dim).abs(),
        "state_offset": normal(*rows, dim, dstate),
        "output_offset": normal(*rows, dim),
    }
    return {name: value for name, value in values.items() if name not in OPTIONAL or name in optional}


def run(update, inputs, softplus, dtype=None, **kwargs):
    inputs = {name: x.clone() if dtype is None else x.to(dtype, copy=True) for name, x in inputs.items()}
    out = update(**inputs, dt_softplus=softplus, **kwargs)
    return {"out": out, "state": inputs["state"]}


def cases():
    chance = random.Random(0)
    for seed in range(30):
        sizes = chance.choice((1, 2, 5)), chance.choice((1, 3, 16, 33, 64)), chance.choice((1, 4, 8, 16, 16, 23))
        flags = {
            "dtype": chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
            "optional": tuple(name for name in OPTIONAL if chance.random() < 0.6),
            "per_row": chance.random() < 0.5,
            "softplus": chance.random() < 0.7,
            "seed": seed,
        }
        words = [*flags["optional"], "per-row" if flags["per_row"] else "shared", str(flags["dtype"])]
        yield pytest.param(sizes, flags, id="-".join([*map(str, sizes), *words]))


@pytest.mark.parametrize("sizes, flags", cases())
def test_selective_state_update(sizes, flags, backend, poison_empty):
    inputs, softplus = make(*sizes, **flags), flags["softplus"]
    exact = run(selective_state_update_reference, inputs, softplus, torch.float64)
    single = run(selective_state_update_reference, inputs, softplus, torch.float32)
    actual = run(selective_state_update, inputs, softplus, backend=backend)
    assert actual["out"].dtype == flags["dtype"] and actual["state"].dtype == torch.float32
    for name, value in actual.items():
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6)
        if value.dtype in (torch.bfloat16, torch.float16):
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        if backend == "triton" and value.dtype == torch.bfloat16 and not torch.cuda.is_available():
            # Triton's interpreter truncates to bfloat16 where a GPU rounds
            allowed = 2**-7
        assert_close(name, exact[name], value, allowed)


@pytest.mark.parametrize("kind", ["bfloat16", "strided", "view"])
def test_state_is_overwritten_whatever_its_memory(backend, kind):
    inputs = make(2, 16, 8)
    expected = run(selective_state_update, inputs, True, backend=backend)
    cache = torch.full((4, 2, 8, 16), float("inf"))
    if kind == "bfloat16":
        state = inputs["state"].bfloat16()
        expected = run(selective_state_update, inputs | {"state": state.float()}, True, backend=backend)
        expected["state"] = expected["state"].bfloat16()
    elif kind == "strided":
        state = cache[1].transpose(1, 2).copy_(inputs["state"])
    else:
        # one layer of a cache
        state = cache.view(4, 2, 16, 8)[1].copy_(inputs["state"])
    before = state.data_ptr()
    out = selective_state_update(**inputs | {"state": state}, dt_softplus=True, backend=backend)
    assert torch.equal(out, expected["out"])
    assert state.data_ptr() == before and torch.equal(state, expected["state"])
    assert cache[0].isinf().all() and cache[2:].isinf().all()


def test_contiguous_state_is_not_copied(native_kernels, monkeypatch):
    inputs = make(2, 16, 8)
    kernel, seen = torch.ops.ssmtune_native.selective_state_update, []
    monkeypatch.setattr(
        torch.ops.ssmtune_native,
        "selective_state_update",
        lambda *args: seen.append(args[0].data_ptr()) or kernel(*args),
    )
    selective_state_update(**inputs, backend="cpu")
    assert seen == [inputs["state"].data_ptr()]


@pytest.mark.parametrize("name", ["state", "A", "state_offset"])
def test_gradients_are_refused(name):
    inputs = make(2, 16, 8)
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name} requires a gradient, but the update has none") as error:
        selective_state_update(**inputs)
    assert "torch.no_grad()" in str(error.value) and "initial_state=state" in str(error.value)
    with torch.no_grad():
        selective_state_update(**inputs)


def test_threads_do_not_change_a_bit(native_kernels):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(selective_state_update, make(8, 512, 16), True, backend="cpu")
        torch.set_num_threads(2)
        two = run(selective_state_update, make(8, 512, 16), True, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for name in one:
        assert torch.equal(one[name], two[name]), name

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


def make(
    batch, dim, dstate, *, dtype=torch.float32, optional=OPTIONAL, rows="shared", groups=None, softplus=True, seed=0
):
    """Random inputs; `rows` says where the offsets of a row come from: "shared", its "own" or one of "adapters"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    leading = {"shared": (), "own": (batch,), "adapters": (3,)}[rows]
    states = (batch, *((groups,) if groups else ()), dstate)
    values = {
        "state": normal(batch, dim, dstate),
        "x": normal(batch, dim).to(dtype),
        "dt": (normal(batch, dim) - 1 if softplus else normal(batch, dim).exp()).to(dtype),
        "A": -normal(dim, dstate).exp(),
        "B": normal(*states).to(dtype),
        "C": normal(*states).to(dtype),
        "D": normal(dim),
        "z": normal(batch, dim).to(dtype),
        "dt_bias": normal(dim) if softplus else normal(dim).abs(),
        "state_offset": normal(*leading, dim, dstate),
        "output_offset": normal(*leading, dim),
    }
    inputs = {name: value for name, value in values.items() if name not in OPTIONAL or name in optional}
    if rows == "adapters" and inputs.keys() & {"state_offset", "output_offset"}:
        inputs["adapter_index"] = torch.randint(-1, 3, (batch,), generator=generator)
    return inputs


def run(update, inputs, softplus, dtype=None, **kwargs):
    inputs = {
        name: x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()
        for name, x in inputs.items()
    }
    out = update(**inputs, dt_softplus=softplus, **kwargs)
    return {"out": out, "state": inputs["state"]}


def cases():
    chance = random.Random(0)
    for seed in range(40):
        sizes = chance.choice((1, 2, 5)), chance.choice((1, 3, 16, 33, 64)), chance.choice((1, 4, 8, 16, 16, 23))
        flags = {
            "dtype": chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
            "optional": tuple(name for name in OPTIONAL if chance.random() < 0.6),
            "rows": chance.choice(("shared", "own", "adapters")),
            "groups": chance.choice([None, None, *(groups for groups in (1, 3, 8) if sizes[1] % groups == 0)]),
            "softplus": chance.random() < 0.7,
            "seed": seed,
        }
        words = [*flags["optional"], flags["rows"], f"{flags['groups']}-groups", str(flags["dtype"])]
        yield pytest.param(sizes, flags, id="-".join([*map(str, sizes), *words]))
    for rows, groups in (("own", None), ("adapters", 3)):
        yield pytest.param((2, 33, 256), {"rows": rows, "groups": groups}, id=f"2-33-256-{rows}-{groups}-groups")


@pytest.mark.parametrize("sizes, flags", cases())
def test_selective_state_update(sizes, flags, backend, poison_empty):
    inputs, softplus = make(*sizes, **flags), flags.get("softplus", True)
    exact = run(selective_state_update_reference, inputs, softplus, torch.float64)
    single = run(selective_state_update_reference, inputs, softplus, torch.float32)
    actual = run(selective_state_update, inputs, softplus, backend=backend)
    assert actual["out"].dtype == inputs["x"].dtype and actual["state"].dtype == torch.float32
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


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_rows_read_the_offsets_of_their_adapters(backend, kind):
    inputs = make(4, 33, 16, rows="adapters", groups=3)
    # a NaN in an entry that no row reads, and in memory between the entries
    stack = torch.full((3, 40, 16), float("nan"))
    inputs["state_offset"] = stack[:, :33].copy_(inputs["state_offset"])
    stack[1] = float("nan")
    index = torch.tensor([2, 9, -1, 9, 0, 9, 2, 9], dtype=kind)[::2]
    actual = run(selective_state_update, inputs | {"adapter_index": index}, True, backend=backend)
    for row, adapter in enumerate(index.tolist()):
        one = {
            name: x[row : row + 1] if name in ("state", "x", "dt", "B", "C", "z") else x for name, x in inputs.items()
        }
        del one["adapter_index"]
        for name in ("state_offset", "output_offset"):
            one[name] = inputs[name][adapter] if adapter >= 0 else None
        expected = run(selective_state_update, {k: v for k, v in one.items() if v is not None}, True, backend=backend)
        for name in actual:
            assert torch.equal(actual[name][row], expected[name][0]), (name, row)


def test_no_stack_is_copied(native_kernels):
    inputs = make(2, 64, 16, rows="adapters")
    inputs["state_offset"] = torch.zeros(1000, 64, 16)
    inputs["output_offset"] = torch.zeros(1000, 64)
    with (
        torch.no_grad(),
        torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        selective_state_update(**inputs, backend="cpu")
        # the long way, by which wrong calls get their words
        torch.ops.ssmtune.selective_state_update(
            *(inputs[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True,
            *(inputs[name] for name in ("state_offset", "output_offset", "adapter_index")), "cpu",
        )  # fmt: skip
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < inputs["output_offset"].nbytes


@pytest.mark.parametrize("value", [-2, 3, 2**40])
def test_adapter_out_of_range(value, backend):
    inputs = make(2, 16, 8, rows="adapters") | {"adapter_index": torch.tensor([0, value])}
    state = inputs["state"].clone()
    for update in (selective_state_update, torch.compile(selective_state_update, backend="eager")):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=rf"adapter_index has {value} for row 1, expected -1 to 2"),
        ):
            update(**inputs, backend=backend)
        assert torch.equal(inputs["state"], state)


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

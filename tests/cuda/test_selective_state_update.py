"""The CUDA kernel of a decoding step: how states are spread over threads, and many adapters in a batch."""

import ctypes

import emulated_cuda
import pytest
import torch
from numerics import assert_close

from ssmtune.ops import backends, selective_state_update
from ssmtune.ops.reference import selective_state_update_reference


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda-emulated", emulated_cuda.backend())
    yield
    emulated_cuda.library().set_order(0)


def make(batch, dim, dstate, groups=1, adapters=3):
    return {
        "state": torch.randn(batch, dim, dstate),
        "x": torch.randn(batch, dim),
        "dt": torch.randn(batch, dim),
        "A": -torch.rand(dim, dstate),
        "B": torch.randn(batch, groups, dstate),
        "C": torch.randn(batch, groups, dstate),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim),
        "dt_bias": torch.randn(dim),
        "state_offset": torch.randn(adapters, dim, dstate),
        "output_offset": torch.randn(adapters, dim),
        "adapter_index": torch.arange(batch) % (adapters + 1) - 1,
    }


def run(update, inputs, **options):
    state = inputs["state"].clone()
    return update(**inputs | {"state": state}, dt_softplus=True, **options), state


# one state in one thread; several threads, with a state for each or with four; all of a warp, more than once
@pytest.mark.parametrize("dstate", [1, 2, 4, 7, 16, 20, 64, 129, 260])
def test_states_over_threads(dstate):
    inputs = make(3, 6, dstate, groups=2)
    expected, expected_state = run(selective_state_update_reference, inputs)
    for order in range(3):
        emulated_cuda.library().set_order(order)
        out, state = run(selective_state_update, inputs, backend="cuda-emulated")
        assert_close("out", expected, out, 1e-6)
        assert_close("state", expected_state, state, 1e-6)


def test_places_outside_the_stacks_read_no_offset():
    inputs = make(4, 6, 16)
    index = torch.tensor([0, 3, -7, 2**40])
    kernel = torch.ops.ssmtune_emulated.selective_state_update
    results = []
    for values in (index, torch.tensor([0, -1, -1, -1])):
        state = inputs["state"].clone()
        named = {name: x for name, x in inputs.items() if name not in ("state", "adapter_index")}
        named |= {"B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
        results.append(kernel(state, **named, dt_softplus=True, adapter_index=values))
    assert torch.equal(*results)


def test_parts_of_a_projection_are_read_where_they_lie():
    inputs = make(3, 8, 16)
    whole = torch.randn(3, 2 * 8 + 2 * 16 + 1)
    x, z, B, C, _ = whole.split([8, 8, 16, 16, 1], dim=1)
    kernel = torch.ops.ssmtune_emulated.selective_state_update
    state, copied = inputs["state"].clone(), inputs["state"].clone()
    arguments = {"A": inputs["A"], "D": None, "dt_bias": None, "dt_softplus": True, "dt": inputs["dt"]}
    arguments |= dict.fromkeys(("state_offset", "output_offset", "adapter_index"))
    out = kernel(state, x=x, B=B, C=C, z=z, **arguments)
    dense = {name: tensor.contiguous() for name, tensor in {"x": x, "B": B, "C": C, "z": z}.items()}
    assert_close("out", kernel(copied, **dense, **arguments), out, 1e-6)
    assert_close("state", copied, state, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 20, 16), (70000, 8192, 128), (2**20, 4096, 3)], ids=str)
def test_threads_cover_states_of_any_size(sizes):
    layout = (ctypes.c_int64 * 4)()
    emulated_cuda.library().update_layout(*map(ctypes.c_int64, sizes), layout)
    vector, lanes, block_channels, blocks = layout
    batch, dim, dstate = sizes
    assert vector == (4 if dstate % 4 == 0 else 1)
    assert lanes in (1, 2, 4, 8, 16, 32) and (lanes * vector >= dstate or lanes == 32)
    assert block_channels * lanes == 128
    assert blocks == batch * -(-dim // block_channels)

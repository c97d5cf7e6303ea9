"""selective_state_update with heads against one step of Mamba-2's scan in float64."""

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import selective_state_update, ssd_scan


def make(batch, nheads, headdim, groups, dstate, dtype=torch.float32):
    """Inputs of a step in which what a head shares is (nheads,), with one of three adapters or none in each row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "state": normal(batch, nheads, headdim, dstate),
        "x": normal(batch, nheads, headdim).to(dtype),
        "dt": normal(batch, nheads).to(dtype),
        "A": -normal(nheads).exp(),
        "B": normal(batch, groups, dstate).to(dtype),
        "C": normal(batch, groups, dstate).to(dtype),
        "D": normal(nheads),
        "z": normal(batch, nheads, headdim).to(dtype),
        "dt_bias": normal(nheads),
        "state_offset": normal(3, nheads, headdim, dstate),
        "output_offset": normal(3, nheads, headdim),
    }
    return inputs, torch.randint(-1, 3, (batch,), generator=generator)


def exact(inputs, adapter_index, dtype):
    """The same by the scan of Mamba-2, over a sequence of one step, with the offsets of each row."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].unsqueeze(1)
    rows = (adapter_index + 1).tolist()
    for name in ("state_offset", "output_offset"):
        stack = torch.cat([torch.zeros_like(inputs[name][:1]), inputs[name]])
        inputs[name] = torch.stack([stack[row] for row in rows])
    out, state = ssd_scan(
        **{"initial_states" if name == "state" else name: x for name, x in inputs.items()},
        dt_softplus=True, return_final_states=True, backend="reference",
    )  # fmt: skip
    return {"out": out[:, 0], "state": state}


def step(inputs, adapter_index, backend, state=None):
    """One step on a copy of the state, with what heads share as views of what their channels have."""
    headdim, dstate = inputs["state"].shape[2:]
    state = inputs["state"].clone() if state is None else state
    shared = {
        name: inputs[name].unsqueeze(-1).expand(*inputs[name].shape, headdim) for name in ("dt", "A", "D", "dt_bias")
    }
    shared["A"] = shared["A"].unsqueeze(-1).expand(-1, -1, dstate)
    arguments = inputs | shared | {"state": state}
    out = selective_state_update(**arguments, adapter_index=adapter_index, dt_softplus=True, backend=backend)
    return {"out": out, "state": state}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 3, 5, 3, 7), (5, 4, 8, 2, 16), (2, 2, 9, 1, 33), (1, 1, 1, 1, 1)], ids=str)
def test_heads(sizes, dtype, backend):
    inputs, adapter_index = make(*sizes, dtype=dtype)
    expected, single = (exact(inputs, adapter_index, wide) for wide in (torch.float64, torch.float32))
    actual = step(inputs, adapter_index, backend)
    assert actual["out"].dtype == dtype
    for name, value in actual.items():
        allowed = max(4 * error_ratio(expected[name], single[name]), 1e-6)
        if value.dtype != torch.float32:
            allowed += 1.5 * error_ratio(expected[name], expected[name].to(value.dtype))
        assert_close(name, expected[name], value, allowed)


def test_state_in_any_memory(backend):
    inputs, adapter_index = make(2, 3, 4, 1, 5)
    expected = step(inputs, adapter_index, backend)
    apart = torch.empty(2, 4, 3, 5).transpose(1, 2).copy_(inputs["state"])
    actual = step(inputs, adapter_index, backend, apart)
    assert torch.equal(actual["out"], expected["out"]) and torch.equal(apart, expected["state"])


def test_no_stack_is_copied(native_kernels):
    inputs, adapter_index = make(2, 4, 16, 1, 16)
    inputs["state_offset"] = torch.zeros(1000, 4, 16, 16)
    inputs["output_offset"] = torch.zeros(1000, 4, 16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        step(inputs, adapter_index, "cpu")
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < inputs["output_offset"].nbytes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dt": (2, 4, 3)}, ["dt has shape (2, 4, 3)", "(batch, nheads, headdim) = (2, 3, 4)", "transpose dt"]),
        ({"B": (2, 2, 5), "C": (2, 2, 5)}, ["groups is 2", "a divisor of nheads = 3"]),
        ({"state_offset": (3, 12, 5)}, ["state_offset has shape (3, 12, 5)", "(n_adapters, nheads, headdim, dstate)"]),
        ({"A": (3,)}, ["A has shape (3,)", "(nheads, headdim, dstate) = (3, 4, 5)"]),
    ],
)
def test_wrong_shapes(changes, words):
    shapes = {"state": (2, 3, 4, 5), "x": (2, 3, 4), "dt": (2, 3, 4), "A": (3, 4, 5), "B": (2, 5), "C": (2, 5)}
    arguments = {name: torch.zeros(shape) for name, shape in (shapes | changes).items()}
    if "state_offset" in changes:
        arguments["adapter_index"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        selective_state_update(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)

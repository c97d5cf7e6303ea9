import os

import pytest
import torch

from ssmtune.ops.reference import selective_state_update_reference

pytest.importorskip("triton")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# batch, dim, dstate: one channel and state, sizes that are no power of two, more states than a program's 512
SHAPES = [(1, 1, 1), (3, 20, 5), (2, 33, 16), (1, 70, 24), (2, 3, 256), (2, 3, 600)]
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
OPTIONAL = ("D", "z", "dt_bias", "state_offset", "output_offset")


def arguments(batch, dim, dstate, dtype, *, per_row=False, groups=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    rows = (batch,) if per_row else ()
    states = (batch, dstate) if groups is None else (batch, groups, dstate)
    return {
        "state": normal(batch, dim, dstate),
        "x": normal(batch, dim, dtype=dtype),
        "dt": normal(batch, dim, dtype=dtype),
        "A": -normal(dim, dstate).exp(),
        "B": normal(*states, dtype=dtype),
        "C": normal(*states, dtype=dtype),
        "D": normal(dim),
        "z": normal(batch, dim, dtype=dtype),
        "dt_bias": normal(dim),
        "dt_softplus": True,
        "state_offset": normal(*rows, dim, dstate),
        "output_offset": normal(*rows, dim),
        "adapter_index": None,
    }


def check(inputs, ratio, assert_close):
    from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd

    expected_state = inputs["state"].clone()
    expected = selective_state_update_reference(**{**inputs, "state": expected_state})
    # poisoned: every output must be written
    out = torch.full_like(inputs["x"], float("nan"))
    selective_state_update_fwd(**inputs, out=out)
    assert_close("out", expected, out, ratio)
    assert_close("state", expected_state, inputs["state"], 1e-5)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-D{0[1]}-N{0[2]}".format)
def test_selective_state_update_fwd(shape, dtype, ratio, assert_close):
    check(arguments(*shape, dtype), ratio, assert_close)


@pytest.mark.parametrize("left_out", [(name,) for name in OPTIONAL] + [OPTIONAL], ids="-".join)
def test_optional_arguments(left_out, assert_close):
    check({**arguments(2, 20, 16, torch.float32), **dict.fromkeys(left_out)}, 1e-5, assert_close)


def test_offsets_of_each_row(assert_close):
    check(arguments(3, 20, 16, torch.float32, per_row=True), 1e-5, assert_close)


@pytest.mark.parametrize("groups", [1, 3, 33])
def test_groups(groups, assert_close):
    check(arguments(2, 33, 5, torch.float32, groups=groups), 1e-5, assert_close)


@pytest.mark.parametrize("left_out", [(), ("state_offset",), ("output_offset",)], ids=["both", "output", "state"])
def test_offsets_of_adapters(left_out, assert_close):
    inputs = arguments(5, 20, 16, torch.float32, per_row=True)
    # one that does not exist is none, and reads nothing: there is memory behind the last
    for name in ("state_offset", "output_offset"):
        inputs[name] = inputs[name][:3]
    inputs["adapter_index"] = torch.tensor([2, -1, 0, 3, 2], device=DEVICE)
    check({**inputs, **dict.fromkeys(left_out)}, 1e-5, assert_close)


def test_without_softplus(assert_close):
    inputs = arguments(2, 20, 16, torch.float32)
    inputs["dt"] = inputs["dt"].abs()
    check({**inputs, "dt_bias": None, "dt_softplus": False}, 1e-5, assert_close)


@pytest.mark.parametrize("dt", [-30.0, -12.0, 19.9, 20.1, 90.0])
def test_softplus_of_extreme_steps(dt, assert_close):
    inputs = arguments(2, 20, 16, torch.float32)
    # the state starts at zero, so that a small step is not lost beside it
    check(
        {**inputs, "state": torch.zeros_like(inputs["state"]), "dt": torch.full_like(inputs["dt"], dt)},
        1e-5,
        assert_close,
    )


def test_offset_is_not_carried():
    from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd

    inputs = arguments(2, 20, 16, torch.float32)
    plain = {**inputs, "state": inputs["state"].clone(), "state_offset": None, "output_offset": None}
    outputs = [torch.empty_like(inputs["x"]) for _ in range(2)]
    selective_state_update_fwd(**inputs, out=outputs[0])
    selective_state_update_fwd(**plain, out=outputs[1])
    assert torch.equal(inputs["state"], plain["state"])
    assert not torch.allclose(outputs[0], outputs[1])

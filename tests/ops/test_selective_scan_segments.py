"""Long sequences of few channels, which the CPU kernels cut into segments and scan in two passes."""

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import selective_scan
from ssmtune.ops.reference import selective_scan_reference

# batch, dim, seqlen, dstate: two to sixteen segments, of whole chunks and not, for one task and for two
SIZES = [(1, 3, 1024, 16), (1, 33, 1100, 5), (2, 16, 1537, 16), (1, 20, 8200, 3)]
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "state_offset", "output_offset")
KINDS = {
    "all": {},
    "plain": {"optional": ()},
    "per-row": {"per_row": ("initial_state",)},
    # the gradients of these have one writer each: the backward scan is not cut
    "offsets-per-row": {"per_row": OPTIONAL[3:]},
    "bfloat16": {"dtype": torch.bfloat16},
}

pytestmark = pytest.mark.usefixtures("native_kernels")


def results(scan, inputs, dtype=None, **kwargs):
    """Return out, last_state and the gradients of all inputs, computed in dtype."""
    inputs = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in inputs.items()}
    out, last_state = scan(**inputs, delta_softplus=True, **kwargs)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x.dtype) for x in (out, last_state)]
    gradients = torch.autograd.grad([out, last_state], list(inputs.values()), weights)
    return {"out": out, "last_state": last_state, **{f"d{name}": x for name, x in zip(inputs, gradients, strict=True)}}


def cpu(**kwargs):
    return selective_scan(**kwargs, return_last_state=True, backend="cpu")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_segments_equal_the_recurrence(sizes, kind, scan_inputs, poison_empty):
    if sizes == SIZES[-1] and kind != "all":
        pytest.skip("once is enough for the longest")
    inputs = scan_inputs(*sizes, **KINDS[kind])
    # slow decays, so that a segment feels the one before
    inputs["A"] = inputs["A"] * 1e-2
    exact = results(selective_scan_reference, inputs, torch.float64)
    single = results(selective_scan_reference, inputs, torch.float32)
    for name, value in results(cpu, inputs).items():
        # all decays of a sequence, each rounded to float32, and their product once more
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6, 2**-25 * sizes[2] * (name == "dinitial_state"))
        if value.dtype == torch.bfloat16:
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


def test_groups(scan_inputs):
    inputs = scan_inputs(1, 32, 1024, 8, groups=2)
    exact = results(selective_scan_reference, inputs, torch.float64)
    for name, value in results(cpu, inputs).items():
        assert_close(name, exact[name], value, 1e-5)


def test_states_that_grow(scan_inputs):
    # over a segment by more than float32 can hold, from nothing
    inputs = scan_inputs(1, 4, 1024, 4, optional=())
    inputs["A"] = torch.full_like(inputs["A"], 1.0)
    inputs["B"] = inputs["B"] * (torch.arange(1024) >= 1000)
    exact = results(selective_scan_reference, inputs, torch.float64)
    out, last_state = cpu(**inputs, delta_softplus=True)
    assert_close("out", exact["out"], out, 1e-4)
    assert_close("last_state", exact["last_state"], last_state, 1e-4)


@pytest.mark.parametrize(("dim", "cut"), [(64, True), (65, False)])
def test_only_few_channels_are_cut(dim, cut, scan_inputs):
    inputs = scan_inputs(1, dim, 1024, 4)
    inputs["A"] = inputs["A"] * 1e-3
    whole = cpu(**inputs, delta_softplus=True)[0]
    first = {name: x[..., :512] if x.shape[-1] == 1024 else x for name, x in inputs.items()}
    short = cpu(**first, delta_softplus=True)[0]
    assert torch.equal(whole[..., :512], short)
    second = {name: x[..., 512:] if x.shape[-1] == 1024 else x for name, x in inputs.items()}
    second["initial_state"] = cpu(**first, delta_softplus=True)[1]
    # the state before the second half is rounded another way when it comes from two passes
    assert torch.equal(whole[..., 512:], cpu(**second, delta_softplus=True)[0]) != cut


def test_threads_do_not_change_a_bit(scan_inputs):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(cpu, scan_inputs(1, 40, 4100, 8))
        torch.set_num_threads(3)
        three = results(cpu, scan_inputs(1, 40, 4100, 8))
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        assert torch.equal(value, three[name]), name

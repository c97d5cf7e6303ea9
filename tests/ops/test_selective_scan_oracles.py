"""Identities every implementation of the selective scan must satisfy, with their gradients."""

import pytest
import torch
from numerics import assert_close

from ssmtune.ops import selective_scan, selective_state_update

SEQUENCES = ("u", "delta", "B", "C", "z")
RATIO = 2e-6


def within(position, seqlen):
    """A position in a sequence of 70 steps, or one like it in a shorter sequence."""
    return position if position < seqlen else (position - 1) % (seqlen - 1) + 1


def run(inputs, **kwargs):
    return selective_scan(**inputs, delta_softplus=True, return_last_state=True, **kwargs)


def steps(inputs, start, stop):
    """Return the inputs of some of the steps: views, so that gradients add up in the whole."""
    return {name: x[:, :, start:stop] if name in SEQUENCES else x for name, x in inputs.items()}


def gradients(results, inputs, weights):
    names = list(inputs)
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    return dict(zip(names, torch.autograd.grad(loss, [inputs[name] for name in names]), strict=True))


@pytest.fixture(params=[(), ("initial_state", "state_offset", "output_offset")], ids=["shared", "per-row"])
def inputs(request, scan_inputs, sizes):
    return {name: x.requires_grad_() for name, x in scan_inputs(*sizes, per_row=request.param).items()}


@pytest.fixture
def weights(sizes):
    batch, dim, seqlen, dstate = sizes
    return torch.randn(batch, dim, seqlen), torch.randn(batch, dim, dstate)


@pytest.mark.parametrize("prefix", [1, 6, 63, 64, 69])
def test_prefix_is_the_initial_state_it_leaves(inputs, backend, prefix, sizes):
    prefix = within(prefix, sizes[2])
    with torch.no_grad():
        whole, last_state = run(inputs, backend=backend)
        _, state = run(steps(inputs, 0, prefix), backend=backend)
        rest = steps(inputs, prefix, None) | {"initial_state": state}
        out, same_state = run(rest, backend=backend)
    assert_close("out", whole[:, :, prefix:], out, RATIO)
    assert_close("last_state", last_state, same_state, RATIO)


@pytest.mark.parametrize("cuts", [(1,), (37,), (64,), (5, 6, 69)], ids=str)
def test_cutting_a_sequence_changes_nothing(inputs, weights, backend, cuts, sizes):
    cuts = sorted({within(cut, sizes[2]) for cut in cuts})
    whole = run(inputs, backend=backend)
    expected = gradients(whole, inputs, weights)

    state, pieces = inputs["initial_state"], []
    for start, stop in zip((0, *cuts), (*cuts, sizes[2]), strict=True):
        out, state = run(steps(inputs, start, stop) | {"initial_state": state}, backend=backend)
        pieces.append(out)
    cut = torch.cat(pieces, dim=2), state
    actual = gradients(cut, inputs, weights)

    for name, a, b in (("out", whole[0], cut[0]), ("last_state", whole[1], cut[1])):
        assert_close(name, a, b, RATIO)
    for name in inputs:
        assert_close(f"d{name}", expected[name], actual[name], 2 * RATIO)


def test_one_prefix_serves_many_continuations(scan_inputs, weights, backend, sizes):
    # the gradient of the shared prefix is the sum over its continuations
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(1, *sizes[1:]).items()}
    cut = within(10, sizes[2])
    prefix, rest = steps(inputs, 0, cut), steps(inputs, cut, None)
    _, state = run(prefix, backend=backend)
    expanded = {name: x.expand(2, -1, -1) if name in SEQUENCES else x for name, x in rest.items()}
    out, _ = run(expanded | {"initial_state": state.expand(2, -1, -1)}, backend=backend)
    whole = {name: x.expand(2, -1, -1) if name in SEQUENCES else x for name, x in inputs.items()}
    expected, _ = run(whole, backend=backend)

    weight = weights[0][:, :, cut:]
    assert_close("out", expected[:, :, cut:], out, RATIO)
    for name in ("u", "delta", "A", "B", "initial_state"):
        a, b = (
            torch.autograd.grad((x * weight).sum(), inputs[name], retain_graph=True)[0]
            for x in (expected[:, :, cut:], out)
        )
        assert_close(f"d{name}", a, b, 2 * RATIO)


def test_state_offset_is_extra_states(inputs, weights, backend, sizes):
    # dstate more states that never move (A = 0, B = 0), start at the offset and are read by the same C
    batch, dim, _, dstate = sizes
    expected = run(inputs, backend=backend)
    offset = inputs["state_offset"].expand(batch, dim, dstate)
    doubled = {name: x for name, x in inputs.items() if name != "state_offset"} | {
        "A": torch.cat([inputs["A"], torch.zeros(dim, dstate)], dim=1),
        "B": torch.cat([inputs["B"], torch.zeros_like(inputs["B"])], dim=1),
        "C": torch.cat([inputs["C"], inputs["C"]], dim=1),
        "initial_state": torch.cat([inputs["initial_state"].expand(batch, dim, dstate), offset], dim=2),
    }
    out, last_state = run(doubled, backend=backend)

    assert_close("out", expected[0], out, RATIO)
    assert_close("last_state", expected[1], last_state[:, :, :dstate], RATIO)
    assert torch.equal(last_state[:, :, dstate:], offset), "the offset moved"
    a = gradients(expected, inputs, weights)
    b = gradients((out, last_state[:, :, :dstate]), inputs, weights)
    for name in inputs:
        assert_close(f"d{name}", a[name], b[name], 2 * RATIO)


def test_offsets_do_not_enter_the_state(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes)
    _, with_offsets = run(inputs, backend=backend)
    del inputs["state_offset"], inputs["output_offset"]
    _, without = run(inputs, backend=backend)
    assert torch.equal(with_offsets, without)


def test_zero_offsets_change_nothing(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes, optional=("D", "z", "delta_bias"))
    plain = run(inputs, backend=backend)
    batch, dim, _, dstate = sizes
    zeros = {
        "initial_state": torch.zeros(dim, dstate),
        "state_offset": torch.zeros(batch, dim, dstate),
        "output_offset": torch.zeros(dim),
    }
    for name, a, b in zip(("out", "last_state"), plain, run(inputs | zeros, backend=backend), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("per_row", [(), ("state_offset", "output_offset")], ids=["shared", "per-row"])
def test_one_token_at_a_time_is_the_scan(scan_inputs, backend, per_row, sizes):
    inputs = scan_inputs(*sizes, per_row=per_row)
    expected, last_state = run(inputs, backend=backend)
    batch, dim, seqlen, dstate = sizes
    state = inputs["initial_state"].expand(batch, dim, dstate).contiguous()
    out = [
        selective_state_update(
            state,
            *(inputs[name][:, :, t] for name in ("u", "delta")),
            inputs["A"],
            *(inputs[name][:, :, t] for name in ("B", "C")),
            inputs["D"],
            inputs["z"][:, :, t],
            inputs["delta_bias"],
            True,
            state_offset=inputs["state_offset"],
            output_offset=inputs["output_offset"],
            backend=backend,
        )
        for t in range(seqlen)
    ]
    assert_close("out", expected, torch.stack(out, dim=2), RATIO)
    assert_close("last_state", last_state, state, RATIO)


def test_rows_do_not_see_each_other(scan_inputs, backend, sizes):
    inputs = scan_inputs(3, *sizes[1:])
    whole, last_state = run(inputs, backend=backend)
    for row in range(3):
        alone = {name: x[row : row + 1] if name in SEQUENCES else x for name, x in inputs.items()}
        out, state = run(alone, backend=backend)
        assert_close("out", whole[row : row + 1], out, RATIO)
        assert_close("last_state", last_state[row : row + 1], state, RATIO)


def test_nothing_sees_the_future(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes)
    cut = within(40, sizes[2])
    before, _ = run(inputs, backend=backend)
    changed = inputs | {name: inputs[name].clone() for name in SEQUENCES}
    for name in SEQUENCES:
        changed[name][:, :, cut:] += 1
    after, _ = run(changed, backend=backend)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])

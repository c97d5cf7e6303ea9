"""Packed sequences are each sequence alone, and grouped channels each group alone."""

import pytest
import torch
from numerics import assert_close

from ssmtune.ops import selective_scan

SEQUENCES = ("u", "delta", "B", "C", "z")
PARAMETERS = ("initial_state", "state_offset", "output_offset")
RATIO = 2e-6
GROUPS_OF_BOUNDS = {
    (0, 70): None,
    (0, 1, 2, 70): 4,
    (0, 64, 65, 129, 200): 1,
    (0, 130, 131, 258): None,
    tuple(range(18)): 2,
}
# the like of each for chunks of 4 steps
FEW_STEPS = dict(
    zip(GROUPS_OF_BOUNDS, [(0, 9), (0, 1, 2, 6), (0, 4, 5, 9, 10), (0, 6, 7, 12), tuple(range(4))], strict=True)
)


def run(inputs, **kwargs):
    return selective_scan(**inputs, delta_softplus=True, return_last_state=True, **kwargs)


def one_by_one(inputs, bounds, per_row, **kwargs):
    outs, states = [], []
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        sequence = {name: x[..., start:stop] if name in SEQUENCES else x for name, x in inputs.items()}
        sequence |= {name: inputs[name][i : i + 1] for name in per_row}
        out, state = run(sequence, **kwargs)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=2), torch.cat(states)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("per_row", [(), PARAMETERS], ids=["shared", "per-sequence"])
@pytest.mark.parametrize("bounds, groups", GROUPS_OF_BOUNDS.items(), ids=str)
def test_packed_is_one_by_one(scan_inputs, backend, bounds, groups, per_row, layout, dtype):
    if backend == "triton":
        if (layout == "first") == (dtype == torch.int64):
            pytest.skip("each layout once is enough for an interpreter")
        bounds = FEW_STEPS[bounds]
    n_sequences, seqlen = len(bounds) - 1, bounds[-1]
    layouts = dict.fromkeys(SEQUENCES, layout)
    inputs = scan_inputs(1, 20, seqlen, 8, per_row=per_row, rows=n_sequences, groups=groups, layouts=layouts)
    for x in inputs.values():
        x.requires_grad_()
    expected = one_by_one(inputs, bounds, per_row, backend=backend)
    actual = run(inputs, cu_seqlens=torch.tensor(bounds, dtype=dtype), backend=backend)
    weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    for name, a, b in zip(("out", "last_state"), expected, actual, strict=True):
        assert_close(name, a, b, 1e-6)
    a, b = (torch.autograd.grad(results, list(inputs.values()), weights) for results in (expected, actual))
    for name, x, y in zip(inputs, a, b, strict=True):
        assert_close(f"d{name}", x, y, RATIO)


def test_sequences_do_not_see_each_other(scan_inputs, backend):
    first, second, end = (7, 9, 13) if backend == "triton" else (70, 75, 140)
    inputs = scan_inputs(1, 20, end, 8)
    cu_seqlens = torch.tensor([0, first, second, end])
    before, states = run(inputs, cu_seqlens=cu_seqlens, backend=backend)
    changed = inputs | {name: inputs[name].clone() for name in SEQUENCES}
    for name in SEQUENCES:
        changed[name][:, :, first:second] += 1
    after, changed_states = run(changed, cu_seqlens=cu_seqlens, backend=backend)
    for same in (slice(0, first), slice(second, end)):
        assert torch.equal(before[:, :, same], after[:, :, same])
    assert torch.equal(states[::2], changed_states[::2])
    assert not torch.equal(states[1], changed_states[1])


@pytest.mark.parametrize("groups", [1, 5, 20])
def test_grouped_is_group_by_group(scan_inputs, backend, groups, sizes):
    # of 5 groups, channels 0 to 3 read the first group of B and C, 4 to 7 the second, and so on
    (batch, _, seqlen, dstate), dim = sizes, 20
    if backend == "triton":
        batch, groups = 1, min(groups, 5)
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(batch, dim, seqlen, dstate, groups=groups).items()}
    whole = run(inputs, backend=backend)
    pieces = []
    for group in range(groups):
        channels = slice(group * dim // groups, (group + 1) * dim // groups)
        part = {name: x[:, group] if name in ("B", "C") else x for name, x in inputs.items()}
        part |= {name: x[channels] for name, x in part.items() if name in ("A", "D", "delta_bias", *PARAMETERS)}
        part |= {name: part[name][:, channels] for name in ("u", "delta", "z")}
        pieces.append(run(part, backend=backend))
    expected = [torch.cat(results, dim=1) for results in zip(*pieces, strict=True)]
    weights = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    for name, a, b in zip(("out", "last_state"), expected, whole, strict=True):
        assert_close(name, a, b, 1e-6)
    a, b = (torch.autograd.grad(results, list(inputs.values()), weights) for results in (expected, whole))
    for name, x, y in zip(inputs, a, b, strict=True):
        assert_close(f"d{name}", x, y, RATIO)


@pytest.mark.parametrize("groups", [None, 5])
def test_threads_do_not_change_a_bit(scan_inputs, native_kernels, groups):
    # more sequences than channels can keep busy, of very different lengths
    lengths = [1, 200, 3, 2, 64, 90, *[7] * 10]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def results(threads):
        inputs = scan_inputs(1, 80, sum(lengths), 16, groups=groups)
        torch.set_num_threads(threads)
        out, last_state = run({name: x.requires_grad_() for name, x in inputs.items()}, cu_seqlens=cu_seqlens)
        return [out, last_state, *torch.autograd.grad(out.square().sum() + last_state.sum(), list(inputs.values()))]

    before = torch.get_num_threads()
    try:
        one, two, three = results(1), results(2), results(3)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("layout", ["first", "last", "last-strided"])
def test_nothing_is_copied(scan_inputs, native_kernels, monkeypatch, layout):
    inputs = scan_inputs(1, 20, 90, 8, groups=2, layouts=dict.fromkeys(SEQUENCES, layout))
    kernel = torch.ops.ssmtune_native.selective_scan_fwd
    seen = []
    monkeypatch.setattr(
        torch.ops.ssmtune_native, "selective_scan_fwd", lambda *args: seen.extend(args) or kernel(*args)
    )
    run(inputs, cu_seqlens=torch.tensor([0, 30, 90]), backend="cpu")
    assert [x.data_ptr() for x in seen[:11]] == [x.data_ptr() for x in inputs.values()]


@pytest.mark.parametrize("lengths", [(256,), (1,) * 256, (63, 65, 64, 64)], ids=len)
def test_kept_states_depend_on_shapes_alone(scan_inputs, native_kernels, lengths):
    inputs = scan_inputs(1, 32, 256, 16, groups=2)
    args = [*inputs.values(), torch.tensor([0, *lengths]).cumsum(0), True, True, "cpu"]
    _, _, chunk_states = torch.ops.ssmtune.selective_scan_fwd(*args)
    assert chunk_states.shape == (1, (256 - len(lengths)) // 32, 32, 16)


@pytest.mark.parametrize("groups", [None, 3], ids=["no-groups", "3-groups"])
@pytest.mark.parametrize("per_row", [(), PARAMETERS], ids=["shared", "per-sequence"])
def test_packed_gradcheck(scan_inputs, per_row, groups):
    inputs = scan_inputs(1, 3, 7, 4, dtype=torch.float64, per_row=per_row, rows=3, groups=groups)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    cu_seqlens = torch.tensor([0, 1, 5, 7])

    def scan(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("wanted", [("state_offset",), ("output_offset",), ("D", *PARAMETERS[1:])], ids="-".join)
@pytest.mark.parametrize("per_row", [(), PARAMETERS], ids=["shared", "per-sequence"])
def test_packed_gradcheck_of_offsets(scan_inputs, wanted, per_row):
    inputs = scan_inputs(1, 3, 7, 4, dtype=torch.float64, per_row=per_row, rows=3)
    cu_seqlens = torch.tensor([0, 1, 5, 7])

    def scan(*tensors):
        named = inputs | dict(zip(wanted, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(scan, tuple(inputs[name].requires_grad_() for name in wanted))

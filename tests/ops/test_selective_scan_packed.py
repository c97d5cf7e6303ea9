"""Packed sequences: the same as each sequence alone."""

import pytest
import torch
from numerics import assert_close

from ssmtune.ops import selective_scan

SEQUENCES = ("u", "delta", "B", "C", "z")
PARAMETERS = ("initial_state", "state_offset", "output_offset")
RATIO = 2e-6


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
@pytest.mark.parametrize(
    "bounds", [(0, 70), (0, 1, 2, 70), (0, 64, 65, 129, 200), (0, 130, 131, 258), tuple(range(18))], ids=str
)
def test_packed_is_one_by_one(scan_inputs, backend, bounds, per_row, layout, dtype):
    n_sequences, seqlen = len(bounds) - 1, bounds[-1]
    layouts = dict.fromkeys(SEQUENCES, layout)
    inputs = scan_inputs(1, 20, seqlen, 8, per_row=per_row, rows=n_sequences, layouts=layouts)
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


@pytest.mark.parametrize("per_row", [(), PARAMETERS], ids=["shared", "per-sequence"])
def test_packed_gradcheck(scan_inputs, per_row):
    inputs = scan_inputs(1, 3, 7, 4, dtype=torch.float64, per_row=per_row, rows=3)
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

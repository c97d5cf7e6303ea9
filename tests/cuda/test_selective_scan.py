"""The CUDA kernels of the selective scan, emulated on the CPU, in whatever order their threads run."""

import dataclasses

import emulated_cuda
import ops_test_selective_scan as ops_tests
import pytest
import torch

from ssmtune.ops import selective_scan

ORDERS = range(4)


def long_case(seed: int) -> ops_tests.Case:
    """A random case of few channels and many steps, which are cut in segments."""
    case = ops_tests.random_case(1000 + seed)
    lengths = (70, 301, 1, 400) if seed % 3 == 0 else None
    batch, seqlen = (1, sum(lengths)) if lengths else (2, 161 + 7 * seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 4 % 3]
    return dataclasses.replace(
        case, sizes=(batch, 5, seqlen, (9, 16, 33)[seed % 3]), dtype=dtype, lengths=lengths, groups=None
    )


@pytest.mark.parametrize("case", [long_case(seed) for seed in range(12)], ids=str)
def test_segments(case, backend, scan_inputs, poison_empty):
    batch, dim, seqlen, dstate = case.sizes
    for backward in (False, True):
        layout = emulated_cuda.scan_layout(backward, batch, dim, seqlen, dstate, rows=len(case.lengths or ()) or batch)
        assert layout["segments"] >= 3
    emulated_cuda.set_order(case.seed % len(ORDERS))
    ops_tests.test_selective_scan(case, backend, scan_inputs, poison_empty)


@pytest.mark.parametrize("seqlen", [70, 300])
@pytest.mark.parametrize("dstate", [16, 40])
def test_order_of_threads_does_not_change_a_bit(backend, scan_inputs, dstate, seqlen):
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(2, 35, seqlen, dstate, groups=5).items()}
    weight = torch.randn(2, 35, seqlen)

    def results(order):
        emulated_cuda.set_order(order)
        out, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
        loss = (out * weight).sum() + last_state.square().sum()
        return [out, last_state, *torch.autograd.grad(loss, list(inputs.values()))]

    first, *others = (results(order) for order in ORDERS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# not from 0, not ascending, without steps, past the end, negative, far away
WRONG_BOUNDS = (
    [3, 70, 65, 96],
    [0, 96, 96, 96],
    [0, 40, 200, 300],
    [-40, -7, -90, 5],
    [2**40, -(2**40), 2**62, -(2**62)],
)


@pytest.mark.parametrize("bounds", WRONG_BOUNDS, ids=str)
def test_wrong_cu_seqlens_stay_in_bounds(backend, scan_inputs, bounds, monkeypatch):
    # on a GPU nobody reads the values first; under AddressSanitizer, below, this is the whole test
    monkeypatch.setattr("ssmtune.ops.packing.sequence_bounds", lambda *args: None)
    inputs = scan_inputs(1, 5, 96, 9, rows=3, per_row=("initial_state",), dtype=torch.bfloat16)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    options = dict(delta_softplus=True, return_last_state=True, backend=backend)
    out, last_state = selective_scan(**inputs, **options, cu_seqlens=torch.tensor(bounds))
    gradients = torch.autograd.grad([out.float().sum() + last_state.sum()], list(inputs.values()))
    assert all(gradient.shape == x.shape for gradient, x in zip(gradients, inputs.values(), strict=True))


def test_more_sequences_than_steps(backend, scan_inputs, monkeypatch):
    monkeypatch.setattr("ssmtune.ops.packing.sequence_bounds", lambda *args: None)
    inputs = scan_inputs(1, 5, 4, 9, optional=())
    with pytest.raises(RuntimeError, match="cu_seqlens names 5 sequences, but there are 4 steps"):
        selective_scan(**inputs, cu_seqlens=torch.arange(6), backend=backend)


def test_address_sanitizer_finds_nothing(sanitized, request):
    # all that the sanitized library has kernels for would take long
    chosen = "test_wrong_cu_seqlens or test_segments and bfloat16 and (1001 or 1009)"
    done = sanitized(
        "-m", "pytest", str(request.path), "-q", "-s", "-p", "no:cacheprovider", "-k", chosen, SSMTUNE_SANITIZED="1"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert f"{2 + len(WRONG_BOUNDS)} passed" in done.stdout

"""The CUDA kernels of the selective scan, emulated on the CPU, in whatever order their threads run."""

import dataclasses

import emulated_scan
import ops_test_selective_scan as ops_tests
import pytest
import torch

from ssmtune.ops import selective_scan

ORDERS = range(4)


@pytest.fixture(autouse=True)
def _forward_order(backend):
    emulated_scan.set_order(0)


@pytest.mark.parametrize("case", ops_tests.CASES[::3], ids=str)
def test_selective_scan(case, backend, scan_inputs, poison_empty):
    emulated_scan.set_order(1 + case.seed % (len(ORDERS) - 1))
    ops_tests.test_selective_scan(case, backend, scan_inputs, poison_empty)


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
    sizes = dict(batch=batch, dim=dim, seqlen=seqlen, dstate=dstate, groups=1, rows=len(case.lengths or ()) or batch)
    for params in (emulated_scan.Forward(**sizes), emulated_scan.Backward(**sizes)):
        assert emulated_scan.scan_layout(params)["segments"] >= 3
    emulated_scan.set_order(case.seed % len(ORDERS))
    ops_tests.test_selective_scan(case, backend, scan_inputs, poison_empty)


@pytest.mark.parametrize("seqlen", [70, 300])
@pytest.mark.parametrize("dstate", [16, 40])
def test_order_of_threads_does_not_change_a_bit(backend, scan_inputs, dstate, seqlen):
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(2, 35, seqlen, dstate, groups=5).items()}
    weight = torch.randn(2, 35, seqlen)

    def results(order):
        emulated_scan.set_order(order)
        out, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
        loss = (out * weight).sum() + last_state.square().sum()
        return [out, last_state, *torch.autograd.grad(loss, list(inputs.values()))]

    first, *others = (results(order) for order in ORDERS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_address_sanitizer_finds_nothing(sanitized, request):
    # all that the sanitized library has kernels for would take long
    chosen = ("test_selective_scan and (144- or 159- or 177-)", "test_segments and (1001 or 1009)")
    options = ("-q", "-s", "-p", "no:cacheprovider", "-k", f"bfloat16 and ({' or '.join(chosen)})")
    done = sanitized("-m", "pytest", str(request.path), *options, SSMTUNE_SANITIZED="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "5 passed" in done.stdout

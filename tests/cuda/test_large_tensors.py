"""Tensors of more than 2**31 elements on a GPU: the last channels and steps are those of a small call."""

import pytest
import torch
from numerics import assert_close

from ssmtune.ops import available_backends, causal_conv1d, selective_scan, selective_state_update

# dim * seqlen is 2**31 and some more
DIM, SEQLEN, DSTATE, LAST = 65600, 32768, 16, 8

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _room() -> None:
    reason = available_backends("selective_scan")["cuda"]
    if reason is not None:
        pytest.skip(reason)
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs 64 GiB of GPU memory")


def sequence(requires_grad: bool = False) -> torch.Tensor:
    x = torch.empty(1, SEQLEN, DIM, device="cuda", dtype=torch.bfloat16).normal_()
    return x.transpose(1, 2).requires_grad_(requires_grad)


def last_channels(x: torch.Tensor) -> torch.Tensor:
    return x.detach()[:, -LAST:].clone().requires_grad_(x.requires_grad)


def test_selective_scan():
    u, delta = sequence(requires_grad=True), sequence()
    A = -torch.rand(DIM, DSTATE, device="cuda") - 0.5
    B, C = (torch.randn(1, SEQLEN, DSTATE, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    dout = sequence()
    out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="cuda")
    (du,) = torch.autograd.grad(out, u, dout)
    small = last_channels(u)
    expected = selective_scan(small, last_channels(delta), A[-LAST:], B, C, delta_softplus=True, backend="cuda")
    (dsmall,) = torch.autograd.grad(expected, small, last_channels(dout))
    # cut in segments, which a call of many channels is not: what differs is rounding
    assert_close("out", expected, out[:, -LAST:], 1e-2)
    assert_close("du", dsmall, du[:, -LAST:], 1e-2)


def test_causal_conv1d():
    x, weight = sequence(requires_grad=True), torch.randn(DIM, 4, device="cuda")
    out = causal_conv1d(x, weight, backend="cuda")
    (dx,) = torch.autograd.grad(out, x, x.detach())
    small = last_channels(x)
    expected = causal_conv1d(small, weight[-LAST:], backend="cuda")
    (dsmall,) = torch.autograd.grad(expected, small, small.detach())
    assert torch.equal(out[:, -LAST:], expected) and torch.equal(dx[:, -LAST:], dsmall)


def test_selective_state_update():
    batch, dim = 2**15 + 8, 4096
    state = torch.randn(batch, dim, DSTATE, device="cuda")
    x = torch.randn(batch, dim, device="cuda", dtype=torch.bfloat16)
    A, B = -torch.rand(dim, DSTATE, device="cuda"), torch.randn(batch, DSTATE, device="cuda", dtype=torch.bfloat16)
    small = state[-LAST:].clone()
    out = selective_state_update(state, x, x, A, B, B, dt_softplus=True, backend="cuda")
    expected = selective_state_update(
        small, *(v[-LAST:] for v in (x, x)), A, B[-LAST:], B[-LAST:], dt_softplus=True, backend="cuda"
    )
    assert torch.equal(out[-LAST:], expected) and torch.equal(state[-LAST:], small)

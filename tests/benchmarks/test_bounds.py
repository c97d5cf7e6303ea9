import pytest
import torch

from ssmtune.measure import bounds
from ssmtune.measure.bounds import Limits
from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.inputs import Shape
from ssmtune.measure.scan_cases import ScanSpec
from ssmtune.measure.update_cases import UpdateSpec

H200 = Limits(4.3e12, "ex2", 4.18e12)
MIB = 2**20


def test_bounds_of_the_scan_are_bytes_and_exponentials():
    spec = ScanSpec(Shape(8, 4096, 2048, 16), "fwd", "cuda", ("bfloat16",), "cuda")
    least = bounds.bounds(spec, H200)
    # four tensors of 128 MiB and two of 0.5 MiB; 20 exponentials for each of 64 Mi steps of a channel
    assert least["memory"] == pytest.approx(1e3 * (4 * 128 + 2 * 0.5) * MIB / 4.3e12)
    assert least["ex2"] == pytest.approx(1e3 * 20 * 64 * MIB / 4.18e12)


def test_backward_adds_to_forward_and_float32_doubles_the_bytes():
    shape = Shape(8, 4096, 2048, 16)
    half = bounds.bounds(ScanSpec(shape, "fwdbwd", "cuda", ("bfloat16",), "cuda"), H200)
    full = bounds.bounds(ScanSpec(shape, "fwdbwd", "cuda", (), "cuda"), H200)
    assert full["memory"] == pytest.approx(2 * half["memory"])
    assert half["ex2"] == full["ex2"] == pytest.approx(2e3 * 20 * 64 * MIB / 4.18e12)


def test_a_limit_that_was_not_measured_bounds_nothing():
    spec = ScanSpec(Shape(1, 16, 16), "fwd", "cuda", (), "cuda")
    assert set(bounds.bounds(spec, Limits(1e12, "ex2", None))) == {"memory"}
    assert set(bounds.bounds(ConvSpec(Shape(1, 16, 16), "fwd"), H200)) == {"memory"}
    assert bounds.bounds(ScanSpec(Shape(1, 16, 16), "fwdbwd", "cuda", ("offset-only",)), H200) == {}


def test_many_adapters_are_read_once_for_each_row():
    shape = Shape(8, 32, 1, 16)
    none, one, many = (
        bounds.bounds(UpdateSpec(shape, "fwd", "cuda", tags), Limits(1e3, "ex2", None))["memory"]
        for tags in ((), ("one-adapter",), ("64-adapters",))
    )
    assert one - none == pytest.approx(4 * 32 * 16)
    assert many - none == pytest.approx(8 * 4 * 32 * 16)


def test_limits_of_this_machine_are_measured(monkeypatch):
    monkeypatch.setattr(bounds, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(bounds, "PRODUCT_SIZE", 16)
    monkeypatch.setattr(bounds, "_seconds", lambda call, device: call() is None or 0.5)
    limits = bounds.measure("cpu")
    assert (limits.bandwidth, limits.unit, limits.rate) == (2 * 2**16 / 0.5, "fma", 16**3 / 0.5)
    assert "Gfma/s" in str(limits)


def test_exponentials_are_counted_as_they_are_computed():
    pytest.importorskip("triton")
    from ssmtune.triton_kernels import exp2_rate

    kept = []
    empty = torch.empty

    def caught(*args, **options):
        kept.append(empty(*args, **options))
        return kept[-1]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", caught)
        assert exp2_rate.exp2_many(device, rounds=2, programs=2) == 2 * 2 * exp2_rate.BLOCK * exp2_rate.UNROLL
    x = torch.arange(2 * exp2_rate.BLOCK).float() * 1e-9
    for _ in range(2 * exp2_rate.UNROLL):
        x = torch.exp2(-x)
    torch.testing.assert_close(kept[0].cpu(), x)

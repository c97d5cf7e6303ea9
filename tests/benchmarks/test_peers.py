import pytest
import torch

from ssmtune.measure.inputs import FULL, Shape, make_inputs
from ssmtune.measure.peers import PEERS, plain_scan, usable
from ssmtune.measure.scan_cases import ScanCase, ScanSpec, expected
from ssmtune.measure.timing import verify

SHAPES = [Shape(2, 20, 33, 8), Shape(1, 16, 64, 16)]


def usable_peer(name: str):
    reason = PEERS[name].why_not()
    if reason is not None:
        pytest.skip(reason)
    return PEERS[name]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mambapy", "unbind loop", "transformers"])
def test_peer_agrees_with_the_recurrence_in_value_and_every_gradient(name, shape):
    usable_peer(name)
    spec = ScanSpec(shape, "fwdbwd", name, ("full",))
    verified = verify(ScanCase(spec), expected(spec.oracle()))
    assert set(verified.errors) == {"out", *FULL}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_cpp_agrees_with_the_recurrence(shape):
    usable_peer("plain C++")
    spec = ScanSpec(shape, "fwd", "plain C++", ("channels-first",))
    assert set(verify(ScanCase(spec), expected(spec)).errors) == {"out"}


def test_plain_cpp_refuses_channels_last_rather_than_copy():
    usable_peer("plain C++")
    with pytest.raises(ValueError, match="channels_first"):
        plain_scan.scan(**make_inputs(SHAPES[0]).with_only().arguments())


def test_usable_gives_a_reason_for_each_peer_it_leaves_out(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    there, missing = usable("cpu")
    assert "plain C++" not in there
    assert "no C++ compiler" in missing["plain C++"]
    assert "mamba_ssm" not in {**there, **missing}


def test_loading_the_plain_loops_leaves_subnormal_numbers_on():
    if plain_scan.why_not() is not None:
        pytest.skip(plain_scan.why_not())
    plain_scan.library()
    assert torch.tensor(1e-40) * 0.5 > 0

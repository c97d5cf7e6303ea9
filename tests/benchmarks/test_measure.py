import time
from dataclasses import replace

import numpy
import pytest
import torch

from benchmarks.peak_memory import peak_memory
from ssmtune.measure.inputs import Shape
from ssmtune.measure.scan_cases import ScanCase, ScanSpec, expected
from ssmtune.measure.timing import (
    GRADIENT_TOLERANCE,
    Disagreement,
    Lap,
    Summary,
    Times,
    Verified,
    error,
    interleave,
    laps,
    verify,
)

SPEC = ScanSpec(Shape(1, 16, 20, 8), "fwdbwd", "unbind loop", ("full",))


class WrongCase(ScanCase):
    """The scan with one thing wrong."""

    def __init__(self, spec, wrong):
        super().__init__(spec)
        self.wrong = wrong

    def scan(self):
        return self.wrong(super().scan(), self.arguments)


class SlowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda out, given: out - out.mean(), id="value"),
        pytest.param(lambda out, given: out + torch.where(torch.arange(20) == 19, torch.nan, 0.0), id="nan"),
        pytest.param(lambda out, given: SlowGradient.apply(out), id="gradient"),
    ],
)
def test_verify_refuses_a_wrong_kernel(wrong):
    with pytest.raises(Disagreement, match="is not timed"):
        verify(WrongCase(SPEC, wrong), expected(SPEC))


def test_verify_refuses_a_wrong_shape():
    spec = replace(SPEC, direction="fwd")
    with pytest.raises(Disagreement):
        verify(WrongCase(spec, lambda out, given: out[:, :, :-1]), expected(spec))


def test_verify_of_some_channels_sees_a_mistake_in_one_of_them():
    def wrong(out, given):
        return out * torch.where(torch.arange(16) == 4, 1.01, 1.0)[:, None]

    chosen = slice(0, None, 4)
    right = expected(SPEC, chosen)
    assert set(right) == {"out", "u", "delta", "z"}
    verify(ScanCase(SPEC), right, chosen)
    with pytest.raises(Disagreement):
        verify(WrongCase(SPEC, wrong), right, chosen)


def test_expected_is_the_same_in_blocks_of_channels(monkeypatch):
    whole = expected(SPEC)
    monkeypatch.setattr("ssmtune.measure.scan_cases.BLOCK_ELEMENTS", 5 * 20 * 8)
    for name, value in expected(SPEC).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)
        assert value.dtype == torch.float64


def test_error_is_relative_and_never_hides_a_nan():
    right = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(right, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert not error(right, torch.tensor([3.0, torch.nan])) <= GRADIENT_TOLERANCE


def test_laps_time_each_stage_and_count_cpu_time_apart_from_waiting():
    def run():
        time.sleep(0.05)
        yield
        yield

    first, second = laps(run())
    assert first.wall >= 0.05 > first.cpu
    assert second.wall < first.wall


def test_summary_has_median_and_quintiles():
    assert Summary.of([5, 1, 4, 2, 3, 11]) == Summary(3.5, 2, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0)


def test_times_add_the_stages_of_one_run_before_the_median():
    times = Times(("fwd", "bwd"), [[Lap(0.001, 0.002), Lap(0.003, 0.006)], [Lap(0.003, 0.006), Lap(0.001, 0.002)]])
    assert times.summary("total", "wall").median == pytest.approx(4)
    assert times.summary("bwd", "cpu").p20 == pytest.approx(2)


def test_interleave_spreads_a_slow_case_over_the_runs_of_a_fast_one():
    order = []

    class Recorded:
        stages = ("fwd",)

        def __init__(self, label, seconds):
            self.label, self.seconds = label, seconds

        def time(self):
            order.append(self.label)
            return [Lap(self.seconds, self.seconds)]

    cases = [Verified(Recorded("fast", 0.1), {}, 0.5), Verified(Recorded("slow", 10.0), {}, 12.0)]
    fast, slow = interleave(cases, seconds=0.95, least=3)
    assert (len(fast.runs), len(slow.runs)) == (9, 3)
    # the first warms up and estimates; every other round goes backwards
    assert "".join(label[0] for label in order) == "f" + "fffs" + "ffsf" + "fffs"


def test_interleave_turns_every_other_round_around():
    order = []

    class Recorded:
        stages = ("fwd",)

        def __init__(self, label):
            self.label = label

        def time(self):
            order.append(self.label)
            return [Lap(0.1, 0.1)]

    interleave([Verified(Recorded(label), {}, 100.0) for label in "abc"], seconds=0.0, least=4)
    assert "".join(order) == "abccbaabccba"


def hold_megabytes(held: int, worked: int):
    """For peak_memory."""
    kept = numpy.ones(held * 2**20, numpy.uint8)
    yield
    numpy.ones(worked * 2**20, numpy.uint8)
    kept.sum()


def test_peak_memory_counts_what_the_work_takes_and_not_what_it_was_given():
    assert peak_memory(hold_megabytes, 200, 64) / 2**20 == pytest.approx(64, abs=8)


def fail_at_work():
    """For peak_memory."""
    yield
    raise ValueError("planted")


def test_peak_memory_reports_what_failed_in_the_other_process():
    with pytest.raises(ValueError, match="planted"):
        peak_memory(fail_at_work)

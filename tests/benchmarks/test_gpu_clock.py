"""The clock of a GPU, with a GPU that is made up; and with one where there is one."""

import types

import pytest
import torch

from benchmarks import gpu_kernels
from ssmtune.measure import results, timing
from ssmtune.measure.call_cases import CallCase
from ssmtune.measure.specs import available


class FakeGpu:
    """A stream on which every call takes a second, and that only `synchronize` waits for."""

    def __init__(self):
        self.clock, self.log = 0.0, []

    def Event(self, enable_timing):  # noqa: N802
        assert enable_timing
        event = types.SimpleNamespace(at=None)

        def record():
            event.at = self.clock
            self.log.append("event")

        event.record = record
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def work(self):
        self.clock += 1
        self.log.append("work")

    def _sleep(self, cycles):
        assert cycles == timing.HEAD_START
        self.clock += 100
        self.log.append("head start")

    def synchronize(self):
        self.log.append("wait")


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    for name in ("Event", "_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    buffer = types.SimpleNamespace(zero_=lambda: fake.log.append("flush"))
    monkeypatch.setattr(timing, "_flush_buffer", lambda: buffer)
    return fake


def test_laps_of_a_gpu_are_between_events_after_a_flush_and_a_head_start(gpu):
    def run():
        gpu.work()
        yield
        gpu.work()
        gpu.work()
        yield

    assert [lap.wall for lap in timing.laps(run(), "cuda")] == [1.0, 2.0]
    assert gpu.log == ["flush", "head start", "event", "work", "event", "work", "work", "event", "wait"]


def test_values_wait_for_the_gpu_before_the_clock_of_the_host_is_read(gpu):
    case = CallCase("call", lambda: torch.ones(2), device="cuda")
    assert case.values()[0]["out"].tolist() == [1, 1]
    assert gpu.log == ["wait"]


def test_peak_memory_is_what_was_allocated_above_what_was_before(gpu, monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    case = CallCase("call", lambda: order.append("run") or torch.ones(2), device="cuda")
    assert case.peak() == 250
    assert order == ["reset", "run"]


def test_tolerances_are_wider_for_half_types_and_on_a_gpu():
    assert timing.tolerances(torch.float32) == (timing.VALUE_TOLERANCE, timing.GRADIENT_TOLERANCE)
    assert timing.tolerances(torch.float32, "cuda")[0] == 10 * timing.VALUE_TOLERANCE
    assert timing.tolerances(torch.bfloat16)[0] == pytest.approx(timing.VALUE_TOLERANCE + 2**-8)


@pytest.mark.gpu
def test_a_call_on_a_gpu_has_a_time_and_a_peak():
    a = torch.randn(1024, 1024, device="cuda")
    case = CallCase("product", lambda: a + a, device="cuda")
    case.time()
    assert [lap.wall > 0 for lap in case.time()] == [True]
    assert case.peak() == 4 * 1024**2


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_measured_beside_its_limits(tmp_path):
    path = tmp_path / "gpu.csv"
    assert gpu_kernels.run(quick=True, csv=path, device="cuda") == 0
    rows = results.read(path)
    assert {row.backend for row in rows if row.metric == "limit"} == {"copy", "ex2"}
    assert {row.metric for row in rows if row.backend == "bound"} == {"least time by memory", "least time by ex2"}
    timed = {row.backend for row in rows if row.metric == "gpu time" and row.op == "selective_scan"}
    assert timed >= set(available("selective_scan", "cuda"))
    assert {row.device for row in rows} == {torch.cuda.get_device_name()}
    assert "driver" in rows[0].torch

import pytest
import torch

from benchmarks import gpu_training
from benchmarks.step_cases import forget_models
from ssmtune.measure import results


@pytest.fixture(autouse=True)
def _own_models(monkeypatch):
    monkeypatch.setattr(gpu_training, "verify_small", lambda *_: None)  # tested with the steps of the CPU
    yield
    forget_models()


def test_run_of_a_gpu_measures_every_method_and_the_authors_way(tmp_path, capsys):
    path = tmp_path / "gpu.csv"
    assert gpu_training.run(True, path, "cpu", minutes=1) == 0
    rows = results.read(path)
    assert {(row.backend, row.variant) for row in rows} == {
        *(("ssmtune", f"{method} 2 layers") for method in gpu_training.METHODS),
        ("authors", "state-offset 2 layers"),
        ("authors", "initial-state 2 layers"),
    }
    assert {row.pass_ for row in rows} == {"fwd", "bwd", "optimizer", "step"}
    assert {(row.dtype, row.threads) for row in rows} == {("bfloat16", 0)}
    step = next(row for row in rows if (row.pass_, row.metric) == ("step", "wall time"))
    rate = next(row for row in rows if row.metric == "throughput")
    assert rate.median == pytest.approx(1e3 * 2 * 16 / step.median, rel=1e-4)


def test_what_does_not_fit_is_a_row_what_fails_is_none_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    measure = gpu_training.GpuSession._measure

    def planted(session, spec, seconds):
        if spec.backend == "authors":
            raise torch.OutOfMemoryError("planted")
        if spec.method == "lora":
            raise AssertionError("no such kernel")
        return measure(session, spec, seconds)

    monkeypatch.setattr(gpu_training.GpuSession, "_measure", planted)
    path = tmp_path / "gpu.csv"
    assert gpu_training.run(True, path, "cpu", minutes=1) == 1
    rows = results.read(path)
    assert {row.metric for row in rows if row.backend == "authors"} == {"out of memory"}
    assert not any(row.variant.startswith("lora") for row in rows)
    assert "no such kernel" in capsys.readouterr().err
    assert any(row.metric == "throughput" and row.variant.startswith("full") for row in rows)


def test_nothing_new_is_started_when_the_time_is_over(tmp_path, capsys):
    assert gpu_training.run(True, tmp_path / "gpu.csv", "cpu", minutes=0) == 0
    assert "left out, for the time is over: ssmtune" in capsys.readouterr().out
    assert not (tmp_path / "gpu.csv").exists()

from dataclasses import replace

import pytest
import torch

from benchmarks import decoding
from benchmarks.bars import judge
from ssmtune import ops
from ssmtune.measure import results, update_cases
from ssmtune.measure.inputs import Shape
from ssmtune.measure.session import Session
from ssmtune.measure.timing import Disagreement, Lap, Times, Verified, verify
from ssmtune.measure.update_cases import UpdateSpec


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(decoding, "NEW_TOKENS", 4)
    monkeypatch.setattr(update_cases, "TIMED_CHANNELS", 1)


def test_run_stores_both_implementations(tmp_path, capsys):
    path = tmp_path / "decoding.csv"
    assert decoding.run(quick=True, csv=path, backends=["reference"]) == 0
    rows = results.read(path)
    assert {(row.backend, row.unit) for row in rows if row.metric in ("wall time", "throughput")} == {
        *((backend, "us") for backend in ("reference", "transformers")),
        *((backend, "tokens/s") for backend in ("ssmtune", "transformers")),
    }
    ratios = [found for bar, found in judge([replace(row, backend=_as_cpu(row.backend)) for row in rows]) if found]
    assert [len(found) for found in ratios] == [1, 1]  # the step and the model, each against transformers


def _as_cpu(backend: str) -> str:
    return "cpu" if backend == "reference" else backend


@pytest.mark.parametrize("tags", [(), ("one-adapter",), ("64-adapters",), ("bfloat16", "64-adapters")], ids=" ".join)
def test_a_wrong_step_is_not_timed(tags, monkeypatch):
    spec = UpdateSpec(Shape(3, 8, 1), "fwd", "reference", tags)
    right = spec.oracle().expected()
    tolerance = 1e-2 if "bfloat16" in tags else 1e-5
    verify(spec.case(), right, value_tolerance=tolerance)
    step = ops.selective_state_update
    monkeypatch.setattr(ops, "selective_state_update", lambda *args, **options: 1.1 * step(*args, **options))
    with pytest.raises(Disagreement):
        verify(spec.case(), right, value_tolerance=tolerance)


def test_many_adapters_are_told_apart_from_one():
    one, many = (UpdateSpec(Shape(3, 8, 1), "fwd", "reference", (tag,)) for tag in ("one-adapter", "64-adapters"))
    with pytest.raises(Disagreement):
        verify(one.case(), many.oracle().expected())


def test_time_of_a_step_is_that_of_a_run_divided_by_its_steps(monkeypatch, capsys):
    monkeypatch.setattr(update_cases, "TIMED_CHANNELS", 40)
    session = Session(results.environment())
    spec = UpdateSpec(Shape(1, 4, 1), "fwd", "reference")
    session._record(Verified(spec.case(), {}, 1.0), Times(("fwd",), [[Lap(0.002, 0.001)]]), 2)
    assert {row.metric: row.median for row in session.rows} == pytest.approx({"cpu time": 100, "wall time": 200})


def test_steps_compare_one_adapter_with_many_on_batches_only():
    one, many = decoding.steps([Shape(1, 32, 1), Shape(64, 32, 1)], ["cpu"], "cpu")
    assert {spec.tags for spec in one} == {()}
    assert {spec.tags for spec in many if spec.backend == "cpu"} == {(), ("one-adapter",), ("64-adapters",)}


def test_other_tokens_are_not_timed(monkeypatch):
    monkeypatch.setattr(decoding, "decode", lambda model, tokens: torch.tensor([id(model)]))
    with pytest.raises(Disagreement, match="different tokens"):
        decoding.decode_models(Session(results.environment(), seconds=0.01), "mamba-5m", 1)

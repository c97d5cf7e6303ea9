import pytest
import torch

from benchmarks import decoding, results
from benchmarks.bars import DECODING, judge
from benchmarks.measure import Disagreement


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(decoding, "NEW_TOKENS", 4)
    monkeypatch.setattr(decoding, "REPEATS", 5)


def test_run_stores_both_implementations(tmp_path, capsys):
    path = tmp_path / "decoding.csv"
    assert decoding.run(quick=True, csv=path) == 0
    rows = results.read(path)
    assert {(row.backend, row.unit) for row in rows} == {
        (backend, unit) for backend in ("cpu", "transformers") for unit in ("us", "tokens/s")
    }
    assert [len(found) for bar, found in judge(rows) if bar.op == DECODING] == [1, 1]


def test_a_wrong_step_is_not_timed(monkeypatch):
    right = decoding.ssmtune.selective_state_update

    def planted(state, *args, **options):
        out = right(state, *args, **options)
        return out if state.dtype == torch.float64 else 1.01 * out

    monkeypatch.setattr(decoding.ssmtune, "selective_state_update", planted)
    session = decoding.Session(results.environment(), 1, 0.01)
    with pytest.raises(Disagreement):
        session.step(1, 32)


def test_other_tokens_are_not_timed(monkeypatch):
    monkeypatch.setattr(decoding, "decode", lambda model, tokens: torch.tensor([id(model)]))
    with pytest.raises(Disagreement, match="different tokens"):
        decoding.Session(results.environment(), 1, 0.01).model("mamba-5m", 1)

import pytest
import torch

from benchmarks import causal_conv1d, results
from benchmarks.bars import CONV, judge
from benchmarks.measure import Disagreement, verify
from benchmarks.shapes import Shape


def test_run_stores_a_row_for_each_number(tmp_path, capsys):
    path = tmp_path / "conv.csv"
    assert causal_conv1d.run(quick=True, csv=path) == 0
    rows = results.read(path)
    assert {(row.backend, row.pass_, row.threads) for row in rows} == {
        (backend, way, threads) for backend in ("cpu", "torch") for way in ("fwd", "fwdbwd") for threads in (1, 2)
    }
    assert all(row.median > 0 for row in rows)


def test_a_wrong_convolution_is_not_timed(monkeypatch):
    right = causal_conv1d.causal_conv1d
    monkeypatch.setattr(causal_conv1d, "causal_conv1d", lambda *args, **options: 1.01 * right(*args, **options))
    shape = Shape(1, 8, 12)
    expected, _ = causal_conv1d.cases(shape, True, torch.float64)["torch"].values()
    verify(causal_conv1d.cases(shape, True)["torch"], expected)
    with pytest.raises(Disagreement):
        verify(causal_conv1d.cases(shape, True)["cpu"], expected)


def test_bars_of_the_convolution_compare_torch_with_ssmtune(tmp_path, monkeypatch):
    monkeypatch.setattr(causal_conv1d, "QUICK", (Shape(1, 1536, 512),))
    path = tmp_path / "conv.csv"
    causal_conv1d.run(quick=True, csv=path)
    ratios = {bar.title: found for bar, found in judge(results.read(path)) if bar.op == CONV}
    assert [len(found) for found in ratios.values()] == [2, 2, 4]

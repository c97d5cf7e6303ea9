import pytest

from benchmarks import causal_conv1d
from benchmarks.bars import CONV, judge
from ssmtune import ops
from ssmtune.measure import results
from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.inputs import Shape
from ssmtune.measure.timing import Disagreement, tolerances, verify


def test_run_stores_a_row_for_each_number(tmp_path, capsys):
    path = tmp_path / "conv.csv"
    assert causal_conv1d.run(quick=True, csv=path) == 0
    rows = [row for row in results.read(path) if "time" in row.metric]
    assert {(row.backend, row.pass_, row.threads) for row in rows} == {
        (backend, way, threads)
        for backend in ("cpu", "torch")
        for way in ("fwd", "bwd", "fwdbwd")
        for threads in (1, 2)
    }
    assert all(row.median > 0 for row in rows)


@pytest.mark.parametrize("half", [(), ("bfloat16",)], ids=["float32", "bfloat16"])
def test_a_wrong_convolution_is_not_timed(monkeypatch, half):
    spec = ConvSpec(Shape(1, 8, 12), "fwdbwd", "reference", ("silu", *half))
    right = spec.oracle().expected()
    assert set(verify(spec.case(), right, None, *tolerances(spec.dtype)).errors) == {"out", "x", "weight", "bias"}
    convolve = ops.causal_conv1d
    monkeypatch.setattr(ops, "causal_conv1d", lambda *args, **options: 1.02 * convolve(*args, **options))
    with pytest.raises(Disagreement):
        verify(spec.case(), right, None, *tolerances(spec.dtype))


def test_bars_of_the_convolution_compare_torch_with_ssmtune(tmp_path, monkeypatch):
    monkeypatch.setattr(causal_conv1d, "QUICK", (Shape(1, 1536, 512),))
    path = tmp_path / "conv.csv"
    causal_conv1d.run(quick=True, csv=path)
    ratios = {bar.title: found for bar, found in judge(results.read(path)) if bar.op == CONV}
    assert [len(found) for found in ratios.values()] == [2, 2, 4]

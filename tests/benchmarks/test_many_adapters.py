import pytest
import torch

from benchmarks import many_adapters
from ssmtune.measure import results
from ssmtune.models import load_model


def test_run_stores_times_ratios_and_memory(tmp_path):
    path = tmp_path / "many.csv"
    assert many_adapters.run(quick=True, csv=path) == 0
    rows = results.read(path)
    for method in many_adapters.METHODS:
        found = {(row.variant.removeprefix(f"{method} "), row.metric): row.median for row in rows}
        assert {metric for variant, metric in found if variant == "6 resident"} == {
            *("load", "peft's load", "memory / tensors"),
        }
        for what in ("prefill", "decode"):
            assert found[f"{what} one adapter", "ratio to one adapter"] == 1
            assert found[f"{what} 3 adapters", "ratio to one adapter"] > 0
            assert found[f"{what} 3 adapters", "cpu time"] > 0


def test_wrong_rows_are_not_timed(tmp_path):
    sizes = many_adapters.QUICK
    many_adapters.store_adapters("state-offset", sizes.resident, tmp_path)
    with torch.no_grad():
        model, _ = many_adapters.load(load_model("mamba-5m")[0], tmp_path)
        names = list(model.peft_config)[: sizes.batch]
        together = many_adapters.cases(model, sizes, names)["prefill", "3 adapters"]()
        many_adapters.check(model, together, sizes, names)
        with pytest.raises(RuntimeError, match="row 0 with 'a1' is not what it is alone"):
            many_adapters.check(model, together, sizes, [names[1], *names[1:]])

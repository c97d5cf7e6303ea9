"""The benchmark of S0 tuning, on a small model."""

import pytest

from benchmarks import s0_tuning
from ssmtune.measure import results


def test_times_what_it_has_checked(tmp_path, monkeypatch):
    pytest.importorskip("s0", reason="s0-tuning is not installed")
    path = tmp_path / "rows.csv"
    assert s0_tuning.run(quick=True, csv=path) == 0
    rows = results.read(path)
    assert {(row.backend, row.metric) for row in rows} == {
        (name, metric) for name in s0_tuning.CASES for metric in ("cpu time", "ratio to ssmtune", "peak memory")
    }
    assert all(row.median == 1 for row in rows if (row.backend, row.metric) == ("ssmtune", "ratio to ssmtune"))
    monkeypatch.setitem(s0_tuning.CASES, "ssmtune", lambda sizes: lambda steps: 5.0)
    with pytest.raises(RuntimeError, match="not timed"):
        s0_tuning.run(quick=True, csv=path)

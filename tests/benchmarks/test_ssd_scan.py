"""The benchmark of Mamba-2's scan, on a small one."""

from benchmarks import ssd_scan
from ssmtune.measure import results


def test_times_what_it_has_checked(tmp_path):
    path = tmp_path / "rows.csv"
    assert ssd_scan.run(quick=True, csv=path) == 0
    rows = results.read(path)
    assert {row.backend for row in rows} == {"cpu", *ssd_scan.PEERS}
    assert {(row.pass_, row.metric) for row in rows} == {
        (pass_, metric) for pass_ in ("fwd", "fwdbwd") for metric in ("wall time", "ratio to cpu")
    }
    assert all(row.median == 1 for row in rows if row.backend == "cpu" and row.metric == "ratio to cpu")

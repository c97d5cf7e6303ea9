import subprocess
import sys

import pytest

from ssmtune.cli import bench
from ssmtune.cli.main import main


def test_bench_runs_the_benchmark_of_the_checkout(tmp_path, monkeypatch, capsys):
    calls = []
    folder = bench.checkout()
    monkeypatch.syspath_prepend(str(folder))
    from benchmarks import selective_scan, training_step

    monkeypatch.setattr(selective_scan, "run", lambda **given: calls.append(("scan", given)) or 0)
    monkeypatch.setattr(training_step, "run", lambda **given: calls.append(("step", given)) or 1)
    assert main(["bench", "--quick"]) == 0
    assert main(["bench", "training-step", "--csv", str(tmp_path / "a.csv")]) == 1
    assert calls == [
        ("scan", {"quick": True, "csv": None}),
        ("step", {"quick": False, "csv": tmp_path / "a.csv"}),
    ]


def test_bench_without_a_checkout_says_to_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "ssmtune" / "cli" / "bench.py"))
    assert main(["bench", "--quick"]) == 1
    assert "clone the repository" in capsys.readouterr().err


def test_plot_needs_a_file_of_the_scan(capsys):
    assert main(["bench", "--plot"]) == 1
    assert main(["bench", "training-step", "--csv", "a.csv", "--plot"]) == 1
    assert "--csv FILE --plot" in capsys.readouterr().err


def test_parser_does_not_import_torch():
    code = (
        "import argparse, sys, os; os.environ['SSMTUNE_LAZY'] = '1'; from ssmtune.cli import bench;"
        "bench.add_parser(argparse.ArgumentParser().add_subparsers()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_benchmark_is_a_usage_error():
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "matmul"])

import subprocess
import sys

import pytest
import torch

from ssmtune.cli.main import main
from ssmtune.measure import bounds, plans, results, session, timing, update_cases
from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.inputs import Shape
from ssmtune.measure.scan_cases import ScanCase, ScanSpec
from ssmtune.measure.update_cases import UpdateSpec


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A plan of every operator that takes no time, and limits that need not be measured."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bounds, "measure", lambda device: bounds.Limits(1e9, "fma", 1e9))
    monkeypatch.setattr(
        session, "interleave", lambda verified, seconds, most: timing.interleave(verified, 0.0, least=2, most=2)
    )
    monkeypatch.setattr(update_cases, "TIMED_CHANNELS", 1)
    monkeypatch.setattr("ssmtune.measure.peers.usable", lambda device: ({}, {"mambapy": "not installed"}))

    def plan(device, preset):
        names = ("reference", "unbind loop")
        scans = [
            [ScanSpec(Shape(1, 8, seqlen, 4), direction, name) for direction in ("fwd", "fwdbwd") for name in names]
            for seqlen in (6, 12, 24)
        ]
        convs = [ConvSpec(Shape(1, 8, 12), "fwd", name) for name in ("reference", "torch")]
        return [*scans, convs, [UpdateSpec(Shape(1, 8, 1, 4), "fwd", "reference")]]

    monkeypatch.setattr(plans, "plan", plan)


def test_bench_prints_ratios_and_bounds_and_writes_rows_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "left out: mambapy: not installed" in printed
    for op in ("selective_scan, ms", "causal_conv1d, ms", "selective_state_update, us"):
        assert f"\n{op}\n" in printed
    assert "x)" in printed and "fma (" in printed and "5/5" in printed
    rows = results.read(tmp_path / "bench.csv")
    assert {row.seqlen for row in rows if row.op == "selective_scan"} == {6, 12, 24}
    assert {row.metric for row in rows if row.backend == "bound"} == {"least time by memory", "least time by fma"}
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_read_shows_the_last_run_of_a_file_without_measuring(tmp_path, capsys, monkeypatch):
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("ssmtune.cli.bench.measure", lambda *_: pytest.fail("measured"))
    assert main(["bench", "--read", str(tmp_path / "bench.csv")]) == 0
    again = capsys.readouterr().out
    table = first[first.index("\nselective_scan, ms") : first.index("\ncausal_conv1d, ms")]
    assert table in again


def test_a_wrong_kernel_is_not_timed_and_fails(tmp_path, capsys, monkeypatch):
    right = ScanCase.scan

    def planted(case):
        return right(case) * (1.001 if case.spec.backend == "reference" else 1)

    monkeypatch.setattr(ScanCase, "scan", planted)
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "A wrong result has no speed" in capsys.readouterr().err
    timed = {row.backend for row in results.read(tmp_path / "bench.csv") if row.op == "selective_scan"}
    assert timed == {"unbind loop", "bound"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out(capsys):
    assert main(["bench", "--device", "cuda"]) == 1
    assert "no GPU found" in (error := capsys.readouterr().err)
    assert "Leave out --device cuda" in error


def test_read_of_a_missing_file_is_an_error(tmp_path, capsys):
    assert main(["bench", "--read", str(tmp_path / "no.csv")]) == 1
    assert "no.csv" in capsys.readouterr().err


def test_parser_does_not_import_torch():
    code = (
        "import argparse, sys, os; os.environ['SSMTUNE_LAZY'] = '1'; from ssmtune.cli import bench;"
        "bench.add_parser(argparse.ArgumentParser().add_subparsers()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

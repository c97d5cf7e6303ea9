import csv
import os

import pytest
import torch

from benchmarks import selective_scan
from benchmarks.worker import ENVIRONMENTS, RemoteCase, Worker, Workers
from ssmtune import native
from ssmtune.measure import results, session
from ssmtune.measure.inputs import FROZEN, Shape
from ssmtune.measure.scan_cases import ScanCase, ScanSpec, expected, forget_inputs, memory_probe
from ssmtune.measure.timing import verify

TINY = Shape(1, 16, 20, 8)


@pytest.fixture
def tiny(monkeypatch):
    """Every part of the benchmark, on shapes that take no time."""
    monkeypatch.setattr(selective_scan, "QUICK", (TINY,))
    monkeypatch.setattr(selective_scan, "MAIN", (TINY,))
    monkeypatch.setattr(selective_scan, "QUADRATIC", (TINY,))
    monkeypatch.setattr(selective_scan, "QUICK_LENGTHS", (Shape(1, 8, 70, 8),))
    monkeypatch.setattr(session, "FULL_VERIFICATION", (64, 2**22))
    monkeypatch.setattr(Workers, "case", lambda workers, spec: ScanCase(spec))  # no other processes


def test_run_writes_a_tidy_row_for_every_number(tiny, tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert selective_scan.run(quick=True, csv=path, backend="reference", parts=("shapes", "quadratic", "lengths")) == 0
    with path.open(newline="") as file:
        header, *body = csv.reader(file)
    assert ",".join(header) == (
        "op,pass,backend,dtype,batch,dim,seqlen,dstate,threads,variant,metric,unit,median,p20,p80,"
        "device,torch,ssmtune,commit,timestamp"
    )
    assert all(len(row) == len(header) and all(row) for row in body)
    rows = results.read(path)
    assert {row.pass_ for row in rows} == {"fwd", "bwd", "fwdbwd"}
    assert {"cpu time", "wall time", "error of out", "error of B", "error of state_offset"} <= {r.metric for r in rows}
    assert {"reference", "unbind loop"} <= {row.backend for row in rows}
    assert {row.seqlen for row in rows} == {20, 70}
    assert all(row.p20 <= row.median <= row.p80 for row in rows)
    assert len({row.timestamp for row in rows}) == 1
    assert " ms  (" in capsys.readouterr().out


def test_run_prints_no_speed_for_a_wrong_kernel_and_fails(tiny, tmp_path, capsys, monkeypatch):
    right = ScanCase.scan

    def planted(case):
        out = right(case)
        return out * 1.001 if case.spec.backend == "unbind loop" else out

    monkeypatch.setattr(ScanCase, "scan", planted)
    path = tmp_path / "out.csv"
    assert selective_scan.run(quick=True, csv=path, backend="reference", parts=("shapes",)) == 1
    printed = capsys.readouterr()
    assert "A wrong result has no speed" in printed.err
    assert "unbind loop" not in printed.out
    assert "unbind loop" not in {row.backend for row in results.read(path)}


def test_quick_run_stores_nothing_by_itself(tiny, monkeypatch):
    monkeypatch.setattr(results, "append", lambda *_: pytest.fail("stored"))
    assert selective_scan.main(["--quick", "--backend", "reference", "--parts", "lengths"]) == 0


def test_run_refuses_a_backend_that_cannot_run(capsys):
    assert selective_scan.run(quick=True, backend="cuda", parts=()) == 1
    assert "backend 'cuda' cannot be measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("direction", "tags", "wrt"),
    [
        ("fwd", ("state-offset",), ()),
        ("fwdbwd", (), FROZEN),
        ("fwdbwd", ("initial-state", "state-offset"), (*FROZEN, "initial_state", "state_offset")),
        ("fwdbwd", ("offset-only",), ("state_offset",)),
    ],
)
def test_spec_asks_for_the_gradients_of_its_tags(direction, tags, wrt):
    spec = ScanSpec(TINY, direction, "reference", tags)
    assert spec.wrt == wrt
    verified = verify(ScanCase(spec), expected(spec.oracle()))
    assert set(verified.errors) == {"out", *wrt}


def test_channels_first_inputs_hold_the_same_values_with_seqlen_contiguous():
    last, first = (ScanCase(ScanSpec(TINY, "fwd", tags=tags)) for tags in ((), ("channels-first",)))
    assert last.arguments["u"].stride(1) == 1 and first.arguments["u"].stride(2) == 1
    assert last.arguments["z"].stride(2) == 2 * TINY.dim  # a view of in_proj's output
    for name, value in last.arguments.items():
        assert torch.equal(value, first.arguments[name])


def test_memory_probe_yields_before_the_work():
    steps = memory_probe(ScanSpec(TINY, "fwdbwd", "unbind loop"))
    assert next(steps) is None
    assert next(steps, "done") == "done"


@pytest.mark.skipif(not native.is_loaded(), reason="the compiled kernels are not built")
def test_workers_run_the_kernels_in_the_environment_asked_for(monkeypatch):
    spec = ScanSpec(TINY, "fwdbwd", "cpu", ("full", "slow"))
    monkeypatch.setitem(ENVIRONMENTS, "slow", {"SSMTUNE_CPU_CAPABILITY": "default", "MALLOC_MMAP_MAX_": "0"})
    with Workers() as workers:
        case = workers.case(spec)
        assert workers.case(spec).worker is case.worker
        assert set(verify(case, expected(spec.oracle())).errors) == {"out", *spec.wrt}
        few = slice(0, None, 4)
        assert set(verify(case, expected(spec.oracle(), few), few).errors) == {"out", "u", "delta", "z"}
        assert [lap.wall > 0 for lap in case.time()] == [True, True]
        with pytest.raises(KeyError):
            RemoteCase(workers, case.worker, ScanSpec(TINY, "fwd", "no such peer")).time()
        workers.forget(forget_inputs)
    assert "MALLOC_MMAP_MAX_" not in os.environ


def test_worker_that_dies_says_how_to_see_why():
    worker = Worker({}, "ssmtune.measure.scan_cases")
    worker.process.terminate()
    worker.process.join()
    with pytest.raises(RuntimeError, match="python -m ssmtune env"):
        worker.ask(1, "forget", forget_inputs)
    worker.close()

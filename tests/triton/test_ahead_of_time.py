"""The Triton kernels compile for GPUs that are not here, within their registers and their bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import instruction_counts

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def compiled(tmp_path, *options):
    """Run the command in a process of its own, for this one may have loaded Triton's interpreter."""
    file = tmp_path / "rows.csv"
    environment = {
        **os.environ,
        # a cache of its own: a kernel compiled earlier would prove nothing
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "SSMTUNE_LAZY": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "benchmarks.instruction_counts", "--csv", file, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    # it fails on spills, on a stack, and on more instructions than the bounds allow
    assert done.returncode == 0, done.stderr[-3000:]
    return instruction_counts.read(file)


def check(rows, target):
    assert {row.target for row in rows} == {target}
    assert {row.op for row in rows} == set(instruction_counts.PER)
    assert all(row.registers > 0 for row in rows)
    assert all((row.instructions is None) == (target.startswith("gfx") or row.op == "ssd_scan") for row in rows)
    assert {row.op for row in rows if row.products} == {"ssd_scan"}
    return {(row.kernel, row.case) for row in rows if row.bound}


def test_kernels_compile(tmp_path):
    assert check(compiled(tmp_path, "--fast", "--target", "sm_90"), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", instruction_counts.TARGETS)
def test_all_kernels_compile(target, tmp_path):
    rows = compiled(tmp_path, "--target", target)
    assert check(rows, target) == instruction_counts.BOUNDS.keys()
    stored = [row for row in instruction_counts.read(instruction_counts.FILE) if row.target == target]
    assert [(row.kernel, row.case) for row in rows] == [(row.kernel, row.case) for row in stored]


def test_stored_rows_keep_their_bounds():
    rows = instruction_counts.read(instruction_counts.FILE)
    assert {row.target for row in rows} == set(instruction_counts.TARGETS)
    assert [fault for row in rows for fault in row.faults] == []
    assert {(row.kernel, row.case) for row in rows if row.bound} == instruction_counts.BOUNDS.keys()


def test_products_that_are_not_on_matrix_units_are_a_fault():
    row = instruction_counts.Row(
        "ssd_scan", "float32", "kernel", "sm_90", 255, 0, 0, 0, None, "", None, "triton 3.9.0", products=0
    )
    assert row.faults == ["kernel, ssd_scan float32, sm_90: its products are not made by matrix units"]


def test_faults_are_named():
    row = instruction_counts.Row(
        "selective_scan", "bfloat16", "kernel", "sm_90", 255, 8, 0, 3, 12.5, "(b,d,t,n)", 10.0, "triton 3.9.0"
    )
    assert row.faults == [
        "kernel, selective_scan bfloat16, sm_90: 3 spills and a stack of 8 bytes",
        "kernel, selective_scan bfloat16, sm_90: 12.5 instructions for each (b,d,t,n), at most 10 are allowed",
    ]

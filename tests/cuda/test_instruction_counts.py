"""The CUDA kernels compile for GPUs that are not here, within their registers and their bounds."""

from dataclasses import replace

import pytest

from benchmarks import cuda_instruction_counts, instruction_counts, sass
from benchmarks.cuda_instruction_counts import KERNELS, SOURCES, demangle, faults


def check_tools():
    try:
        cuda_instruction_counts.nvcc()
        sass.tool("cuobjdump")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_kernels_compile(tmp_path):
    check_tools()
    file = tmp_path / "rows.csv"
    arguments = ["--target", "sm_90", "--source", "selective_state_update.cu", "--csv", str(file)]
    assert cuda_instruction_counts.main(arguments) == 0
    rows = instruction_counts.read(file)
    assert {row.kernel for row in rows} == {"selective_state_update_kernel"} and len(rows) == 6


@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_instruction_counts.TARGETS)
def test_all_kernels_compile(target, tmp_path):
    check_tools()
    file = tmp_path / "rows.csv"
    # it fails on spills, on a stack, on more registers than there are and more instructions than the bounds allow
    assert cuda_instruction_counts.main(["--target", target, "--csv", str(file)]) == 0
    rows = instruction_counts.read(file)
    assert {row.kernel for row in rows} == KERNELS.keys()
    stored = [row for row in instruction_counts.read(cuda_instruction_counts.FILE) if row.target == target]
    assert {(row.kernel, row.case) for row in rows} >= {(row.kernel, row.case) for row in stored}


def test_stored_rows_keep_their_bounds():
    rows = instruction_counts.read(cuda_instruction_counts.FILE)
    assert {row.target for row in rows} == set(cuda_instruction_counts.TARGETS)
    assert {row.kernel for row in rows} <= KERNELS.keys()
    assert [fault for row in rows for fault in faults(row)] == []
    assert {row.kernel for row in rows if row.bound} == {row.kernel for row in rows if KERNELS[row.kernel].bounds}


def test_every_source_is_compiled():
    known = {path.name for path in SOURCES.glob("*.cu")}
    assert {"causal_conv1d_fwd.cu", "causal_conv1d_bwd.cu", "selective_state_update.cu"} <= known


def test_faults_are_named():
    row = instruction_counts.Row(
        *("causal_conv1d", "bfloat16, 4 channels, silu", "causal_conv1d_channels_fwd_kernel", "sm_90", 80, 0, 0, 0),
        *(21.0, "(b,d,t)", 20.0, "nvcc 13.0.88"),
    )
    assert "21.0 instructions for each (b,d,t), at most 20" in faults(row)[0]
    (fault,) = faults(replace(row, instructions=15.0, registers=81))
    assert fault.endswith("81 registers, but 3 blocks of 256 threads have 80 each")
    (fault,) = faults(replace(row, instructions=15.0, spills=3))
    assert "3 spills" in fault


def test_names_are_read():
    mangled = "_ZN7ssmtune4cuda12_GLOBAL__N_133causal_conv1d_channels_fwd_kernelI13__nv_bfloat16Li4ELb1EEEvNS0_1XE"
    assert demangle(mangled) == ("causal_conv1d_channels_fwd_kernel", "bfloat16", [4, 1])
    with pytest.raises(ValueError, match="what is expected"):
        demangle("_Z14unknown_kernelv")

"""How the CUDA kernels of the selective scan are laid out over a GPU, for sizes that no machine here holds."""

import pytest
from emulated_cuda import scan_layout

CASES = {
    # a training step of a large model
    "large": dict(batch=8, dim=4096, seqlen=2048, dstate=16),
    "past-2**31-values": dict(batch=64, dim=8192, seqlen=65536, dstate=16),
    "past-2**31-steps": dict(batch=1, dim=1, seqlen=2**32 + 5, dstate=1),
    "past-2**31-channels": dict(batch=1, dim=2**33, seqlen=1, dstate=256),
    "past-2**16-rows": dict(batch=2**17, dim=64, seqlen=2**10, dstate=16),
    "grouped": dict(batch=4, dim=6144, seqlen=8192, dstate=64, groups=8),
    "packed": dict(batch=1, dim=1536, seqlen=2**20, dstate=16, rows=5000),
    "one-row": dict(batch=1, dim=1536, seqlen=4096, dstate=16),
    "tiny": dict(batch=1, dim=1, seqlen=1, dstate=1),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_every_channel_row_and_state_has_a_thread(backward, sizes):
    x = scan_layout(backward, **sizes)
    groups, rows = sizes.get("groups", 1), sizes.get("rows", sizes["batch"])
    assert x["states"] * x["lanes"] >= sizes["dstate"]
    assert x["block_channels"] * x["lanes"] == (256 if backward and sizes["dstate"] <= 128 else 128)
    section = sizes["dim"] // groups
    assert (x["section_blocks"] - 1) * x["block_channels"] < section <= x["section_blocks"] * x["block_channels"]
    assert x["channel_blocks"] == groups * x["section_blocks"]
    assert x["row_groups"] == (min(rows, 64) if backward else rows)
    # all of them in one axis of the grid, the only one that is longer than 65535
    assert x["blocks"] == x["channel_blocks"] * x["row_groups"] * x["segments"]
    assert x["blocks"] < 2**31 or sizes["dim"] == 2**33


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_time_is_cut_only_where_there_is_little_else(backward):
    assert scan_layout(backward, **CASES["large"])["segments"] == 1
    assert scan_layout(backward, **CASES["tiny"])["segments"] == 1
    cut = scan_layout(backward, **CASES["one-row"])
    assert cut["segments"] > 8 and 256 / 2 <= cut["blocks"] <= 512
    # never in pieces shorter than two chunks, nor in two
    assert scan_layout(backward, batch=1, dim=16, seqlen=160, dstate=16)["segments"] == 1
    assert scan_layout(backward, batch=1, dim=16, seqlen=161, dstate=16)["segments"] == 3


def test_workspace():
    sizes = CASES["past-2**31-values"]
    assert scan_layout(False, **sizes)["workspace_floats"] == 0
    blocks, channels, row_groups = 8192 // 64, 8192, 64
    states = 64 * blocks * 65536 * 2 * 16
    # dA, dinitial_state and dstate_offset; dD, ddelta_bias and doutput_offset
    assert scan_layout(True, **sizes)["workspace_floats"] == states + row_groups * channels * (3 * 16 + 3)
    layout = scan_layout(False, **CASES["one-row"])
    assert layout["workspace_floats"] == layout["segments"] * 1536 * 17

"""How the CUDA kernels of the selective scan are laid out over a GPU, for sizes that no machine here holds."""

import emulated_scan
import pytest

CASES = {
    # a training step of a large model
    "large": dict(batch=8, dim=4096, seqlen=2048, dstate=16),
    "past-2**31-values": dict(batch=64, dim=8192, seqlen=65536, dstate=16),
    "past-2**31-steps": dict(batch=1, dim=1, seqlen=2**32 + 5, dstate=1),
    "past-2**31-channels": dict(batch=1, dim=2**33, seqlen=1, dstate=256),
    "grouped": dict(batch=4, dim=6144, seqlen=8192, dstate=64, groups=8),
    "packed": dict(batch=1, dim=1536, seqlen=2**20, dstate=16, rows=5000),
    "one-row": dict(batch=1, dim=1536, seqlen=4096, dstate=16),
    "tiny": dict(batch=1, dim=1, seqlen=1, dstate=1),
}


@pytest.fixture(params=[emulated_scan.Forward, emulated_scan.Backward], ids=["forward", "backward"])
def scan_layout(request, backend):
    def layout(batch, dim, seqlen, dstate, groups=1, rows=None, **pointers):
        sizes = dict(batch=batch, dim=dim, seqlen=seqlen, dstate=dstate, groups=groups, rows=rows or batch)
        return emulated_scan.scan_layout(request.param(**sizes, **pointers))

    layout.backward = request.param is emulated_scan.Backward
    return layout


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_every_channel_row_and_state_has_a_thread(scan_layout, sizes):
    x = scan_layout(**sizes)
    groups, rows = sizes.get("groups", 1), sizes.get("rows", sizes["batch"])
    assert x["states"] * x["lanes"] >= sizes["dstate"]
    assert x["block_channels"] * x["lanes"] == (256 if scan_layout.backward else 128)
    section = sizes["dim"] // groups
    assert (x["section_blocks"] - 1) * x["block_channels"] < section <= x["section_blocks"] * x["block_channels"]
    assert x["channel_blocks"] == groups * x["section_blocks"]
    assert x["row_groups"] == (min(rows, 64) if scan_layout.backward else rows)
    assert x["blocks"] == x["channel_blocks"] * x["row_groups"] * x["segments"]


def test_time_is_cut_only_where_there_is_little_else(scan_layout):
    assert scan_layout(**CASES["large"])["segments"] == 1
    assert scan_layout(**CASES["tiny"])["segments"] == 1
    cut = scan_layout(**CASES["one-row"])
    assert cut["segments"] > 8 and 256 / 2 <= cut["blocks"] <= 512
    # never in pieces shorter than two chunks, nor in two
    assert scan_layout(batch=1, dim=16, seqlen=160, dstate=16)["segments"] == 1
    assert scan_layout(batch=1, dim=16, seqlen=161, dstate=16)["segments"] == 3


def test_workspace(backend):
    sizes = CASES["past-2**31-values"] | {"groups": 1, "rows": 64}
    assert emulated_scan.scan_layout(emulated_scan.Forward(**sizes))["workspace_floats"] == 0
    # nothing that is not wanted
    assert emulated_scan.scan_layout(emulated_scan.Backward(**sizes))["workspace_floats"] == 0
    blocks = 8192 // 64
    wanted = emulated_scan.scan_layout(emulated_scan.Backward(**sizes, dB=16, dA=16))["workspace_floats"]
    assert wanted == 64 * blocks * 65536 * 2 * 16 + 64 * 8192 * 16
    cut = CASES["one-row"] | {"groups": 1, "rows": 1}
    layout = emulated_scan.scan_layout(emulated_scan.Forward(**cut))
    assert layout["workspace_floats"] == layout["segments"] * 1536 * 17

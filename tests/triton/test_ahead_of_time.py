import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)
def test_kernels_compile_without_spills(capability, tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        # a cache of its own: a kernel compiled earlier would prove nothing
        "TRITON_CACHE_DIR": str(tmp_path),
        "SSMTUNE_LAZY": "1",
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)

    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows} >= {"fp32-N16", "bf16-N16", "fp16-N16", "fp32-N16-plain"}
    assert all(row["sm"] == capability for row in rows)
    assert [row for row in rows if row["spills"] or row["stack"]] == []

"""The kernel that measures a GPU's exponentials computes nothing else, in machine code that needs no GPU to be read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PRINT_CODE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssmtune.triton_kernels.exp2_rate import BLOCK, NUM_WARPS, UNROLL, exp2_rate_kernel

constants = {"BLOCK": BLOCK, "UNROLL": UNROLL}
signature = {"out_ptr": "*fp32", "rounds": "i32", **dict.fromkeys(constants, "constexpr")}
source = ASTSource(fn=exp2_rate_kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    subprocess.run([tool, "-c", file.name], check=True)
"""


def test_its_loop_is_exponentials_alone(tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "SSMTUNE_LAZY": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CODE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", done.stdout, re.MULTILINE)
    places = [place for place, name in enumerate(names) if name == "MUFU.EX2"]
    loop = names[places[0] : places[-1] + 1]
    # 8 elements to a thread, 16 of theirs in turn; a few instructions count the rounds
    assert loop.count("MUFU.EX2") == 8 * 16
    assert len(loop) <= 8 * 16 + 8

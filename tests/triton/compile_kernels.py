"""Compiles the Triton kernels for NVIDIA GPUs, needing neither a GPU nor a driver, and prints one JSON line for each.

    TRITON_INTERPRET=0 python tests/triton/compile_kernels.py 90

A script of its own because the test session runs Triton's interpreter, which is chosen when triton is imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

STATE_UPDATE = {
    **{
        name: "*fp32"
        for name in ("state_ptr", "A_ptr", "D_ptr", "dt_bias_ptr", "state_offset_ptr", "output_offset_ptr")
    },
    **{name: "*{dtype}" for name in ("x_ptr", "dt_ptr", "B_ptr", "C_ptr", "z_ptr", "out_ptr")},
    **{
        name: "i32"
        for name in ("dim", "dstate", "group_size", "n_adapters", "stride_state_offset", "stride_output_offset")
    },
    "adapter_index_ptr": "*i64",
}
OPTIONAL = ("D_ptr", "z_ptr", "dt_bias_ptr", "state_offset_ptr", "output_offset_ptr", "adapter_index_ptr")


def cases():
    """Yields (label, kernel, signature, constants)."""
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {name: kind.format(dtype=dtype) for name, kind in STATE_UPDATE.items()}
        for dstate, block_d, grouped in ((16, 32, False), (128, 4, False), (256, 2, False), (16, 32, True)):
            constants = {"DT_SOFTPLUS": True, "GROUPED": grouped, "BLOCK_D": block_d, "BLOCK_N": dstate}
            yield f"{dtype}-N{dstate}{'-grouped' * grouped}", selective_state_update_fwd_kernel, signature, constants
    constants = {"DT_SOFTPLUS": False, "GROUPED": False, "BLOCK_D": 32, "BLOCK_N": 16, **dict.fromkeys(OPTIONAL)}
    yield "fp32-N16-plain", selective_state_update_fwd_kernel, signature, constants


def disassemble(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main(capability: int) -> None:
    for label, kernel, signature, constants in cases():
        signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "enable_fp_fusion": True},
        )
        cubin = compiled.asm["cubin"]
        resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", disassemble("cuobjdump", "-res-usage", cubin)))
        spills = re.findall(r"\b(?:LDL|STL)\b", disassemble("nvdisasm", "-c", cubin))
        row = {"case": label, "kernel": kernel.__name__, "sm": capability, "registers": int(resources["REG"])}
        print(json.dumps({**row, "stack": int(resources["STACK"]), "spills": len(spills)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))

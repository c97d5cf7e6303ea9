"""Compiles the Triton kernels for GPUs that need not be there, and counts registers and instructions.

`python -m benchmarks.instruction_counts` writes benchmarks/results/compiled/triton.csv. Without a GPU this is what is
known of the time a kernel takes: an SM issues four instructions per clock, one for each of 32 threads. It ends with 1
when a kernel spills registers or is above its bound.
"""

import argparse
import csv
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("results") / "compiled" / "triton.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BLOCKS = ("BLOCK_T", "BLOCK_N", "BLOCK_D")
STEPS = ("AHEAD", "STEPS")
PER = {
    "selective_scan": "(b,d,t,n)",
    "causal_conv1d": "(b,d,t)",
    "causal_conv1d_update": "(b,d)",
    "selective_state_update": "(b,d,n)",
    "ssd_scan": None,
}
"""What the instructions of an operator are counted for: as many as the product of its kernels' blocks.

None where these are matrices, of which an instruction multiplies some: then those are counted, in all of the code.
"""
BOUNDS = {
    ("selective_scan_fwd_kernel", "bfloat16"): 11.0,
    ("selective_scan_fwd_kernel", "bfloat16, 256 states"): 11.0,
    ("selective_scan_fwd_kernel", "bfloat16, offsets"): 12.0,
    ("selective_scan_bwd_kernel", "bfloat16"): 35.0,
    ("selective_scan_bwd_kernel", "bfloat16, 64 states"): 36.0,
    ("selective_scan_bwd_kernel", "bfloat16, 256 states"): 48.0,
    ("selective_scan_bwd_kernel", "bfloat16, all gradients"): 38.0,
    ("selective_scan_bwd_kernel", "bfloat16, offsets"): 38.0,
    ("selective_scan_bwd_kernel", "bfloat16, initial state alone"): 10.0,
    ("causal_conv1d_fwd_kernel", "bfloat16"): 26.0,
    ("causal_conv1d_bwd_kernel", "bfloat16"): 48.0,
    ("causal_conv1d_bwd_kernel", "bfloat16, all gradients"): 54.0,
    ("selective_state_update_fwd_kernel", "bfloat16"): 25.0,
    ("selective_state_update_fwd_kernel", "bfloat16, 64 states"): 36.0,
}
"""Instructions that a kernel may have at most in a case, on any target."""


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one target.

    Attributes:
        stack: bytes of a thread.
        shared: bytes of a program.
        instructions: of its loops over time, or of the whole kernel where it has none, for each (b,d,t,n) or whatever
            `per` says. None for AMD, whose code is not read, and for kernels that multiply matrices.
        bound: of the instructions, where there is one.
        products: instructions of the matrix units, None for kernels that multiply no matrices.
    """

    op: str
    case: str
    kernel: str
    target: str
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: float | None
    per: str
    bound: float | None
    compiler: str
    products: int | None = None

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spills and a stack of {self.stack} bytes")
        if self.products == 0:
            found.append("its products are not made by matrix units")
        if self.bound is not None and self.instructions is not None and self.instructions > self.bound:
            found.append(
                f"{self.instructions:.1f} instructions for each {self.per}, at most {self.bound:g} are allowed"
            )
        return [f"{self.kernel}, {self.op} {self.case}, {self.target}: {what}" for what in found]


def count(targets: Iterable[str], fast: bool = False, ops: Sequence[str] = ()) -> Iterable[Row]:
    """Compile and count the kernels of every case, each once: one that an earlier case had is left out.

    Args:
        fast: those that stand for the others.
        ops: the operators; all of them by default.
    """
    from benchmarks.kernel_cases import cases
    from benchmarks.triton_launches import recorded

    chosen = [case for case in cases() if (case.fast or not fast) and (not ops or case.op in ops)]
    for target in targets:
        seen = set()
        for case in chosen:
            with recorded(target) as launches:
                case.call()
            for launch in launches:
                if launch.compiled.hash not in seen:
                    seen.add(launch.compiled.hash)
                    yield _row(case.op, case.label, target, launch)


def _row(op: str, case: str, target: str, launch) -> Row:
    import triton

    if launch.arguments.get("REVERSE"):
        case += ", in reverse"
    if launch.arguments.get("STRIDE_VALUE") == 1:
        case += ", over heads"
    per = "(b,d,n) of a segment" if launch.kernel == "selective_scan_carry_kernel" else PER[op]
    metadata, instructions = launch.compiled.metadata, None
    if target.startswith("gfx"):
        assembly = launch.compiled.asm["amdgcn"]
        registers, spills, stack = _of_amd(assembly)
        products = len(re.findall(r"^\s+v_mfma", assembly, flags=re.MULTILINE))
    else:
        kernel = _read(launch)
        registers, spills, stack, products = kernel.registers, kernel.spills, kernel.stack, kernel.products
        if per is not None:
            instructions = _for_each(launch, kernel)
    return Row(
        op, case, launch.kernel, target, registers, stack, metadata.shared, spills, instructions, per or "",
        BOUNDS.get((launch.kernel, case)), f"triton {triton.__version__}",
        products if "PRECISION" in launch.arguments else None,
    )  # fmt: skip


def _for_each(launch, kernel) -> float:
    loops = [loop for loop in kernel.loops if loop.count("MUFU.EX2")]
    # the backward scan has two loops, each with tiles of its own
    steps = [launch.arguments[name] for name in STEPS if name in launch.arguments] or [1]
    if loops:
        total = sum(loop.instructions / n for loop, n in zip(loops, steps, strict=True))
    else:
        total = kernel.instructions / steps[-1]
    lanes = math.prod(launch.arguments[name] for name in BLOCKS if name in launch.arguments)
    return round(total * 32 * launch.compiled.metadata.num_warps / lanes, 2)


def _read(launch):
    from benchmarks import sass

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        return sass.read(file.name, launch.kernel)


def _of_amd(assembly: str) -> tuple[int, int, int]:
    """Vector registers, their spills, and the stack of a kernel in AMD's assembly."""
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", assembly, flags=re.MULTILINE)}
    return found["vgpr_count"], found["vgpr_spill_count"], found["private_segment_fixed_size"]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(asdict(row).values() for row in rows)


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file."""
    with path.open(newline="") as file:
        return [
            Row(**{name: _PARSE.get(name, str)(text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]


def _optional(text: str) -> float | None:
    return float(text) if text else None


_PARSE = {
    **dict.fromkeys(("registers", "stack", "shared", "spills"), int),
    **dict.fromkeys(("instructions", "bound"), _optional),
    "products": lambda text: int(text) if text else None,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instruction_counts", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="one GPU; may be repeated")
    parser.add_argument("--op", action="append", choices=tuple(PER), help="one operator; may be repeated")
    parser.add_argument("--fast", action="store_true", help="cases that stand for the others; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help=f"the file to write (default: {FILE})")
    options = parser.parse_args(argv)
    # read when triton is imported, which the functions above do
    os.environ["TRITON_INTERPRET"] = "0"

    rows = []
    for row in count(options.target or TARGETS, options.fast, options.op or ()):
        rows.append(row)
        instructions = "" if row.instructions is None else f"{row.instructions:8.1f} per {row.per}"
        if row.products is not None:
            instructions = f"{row.products:8} of matrix units"
        title = f"{row.target:7} {row.kernel:36} {row.case:36}"
        print(f"{title} {row.registers:4} registers {row.shared:6} B shared {instructions}", flush=True)
    whole = not (options.target or options.op or options.fast)
    if options.csv or whole:
        write(options.csv or FILE, rows)
        print(f"{len(rows)} rows written to {options.csv or FILE}\n  next: python -m benchmarks.tables")
    faults = [fault for row in rows for fault in row.faults]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

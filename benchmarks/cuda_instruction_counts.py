"""Compiles the CUDA kernels for GPUs that need not be there, and counts registers and instructions.

`python -m benchmarks.cuda_instruction_counts` writes benchmarks/results/compiled/cuda.csv, in the form and with the
meaning of what instruction_counts writes for Triton. It ends with 1 when a kernel spills, needs more registers than the
blocks that its design counts on leave it, or has more instructions than its bound.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import sass
from benchmarks.instruction_counts import Row, write

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FILE = Path(__file__).with_name("results") / "compiled" / "cuda.csv"
TARGETS = ("sm_80", "sm_90", "sm_100")
# as in CMakeLists.txt
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}")
REGISTERS = 65536
"""Of an SM."""
FLAGS_SAID = ("silu", "offset", "reverse")
"""Template arguments that are said in a case where they are true."""
DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


@dataclass(frozen=True)
class Kernel:
    """What is expected of a kernel.

    Attributes:
        op: the operator it belongs to.
        threads: of a block.
        blocks: that an SM must have room for, as far as registers go; a case may have fewer, see `crowded`.
        arguments: names of the template arguments after the dtype; those of true and false are said or left out.
        per: what instructions are counted for.
        elements: how many of these one iteration of the loop that counts stands for, or one thread where none does, and
            the template argument that multiplies them.
        loop: which loops count: "main", the one with the most multiplications; "all", those with exponentials; or none
            and the whole kernel.
        bounds: instructions at most, by a pattern of the beginning of the case.
        crowded: a pattern of targets and cases that may need all the registers there are: those of many states, and
            those of which the shared memory of an SM holds one block.
    """

    op: str
    threads: int
    blocks: int
    arguments: tuple[str, ...] = ()
    per: str = "(b,d,t)"
    elements: tuple[float, str | None] = (1, None)
    loop: str | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    crowded: str = "never"

    @property
    def registers(self) -> int:
        """Those that `blocks` leave a thread: they are handed out in units of 8."""
        return REGISTERS // (self.threads * self.blocks) // 8 * 8


KERNELS = {
    # three blocks of eight warps have 24 KiB of loads under way, as many as hide the latency of memory
    "causal_conv1d_channels_fwd_kernel": Kernel(
        "causal_conv1d",
        256,
        3,
        ("channels", "silu"),
        elements=(4, "channels"),
        loop="main",
        bounds={"bfloat16, 4 channels": 20.0},
    ),
    "causal_conv1d_channels_bwd_kernel": Kernel(
        "causal_conv1d",
        256,
        2,
        ("channels", "silu"),
        elements=(2, "channels"),
        loop="main",
        bounds={"bfloat16, 4 channels": 45.0},
    ),
    "causal_conv1d_steps_fwd_kernel": Kernel("causal_conv1d", 256, 4, loop="main"),
    # a round of 32 lanes finishes 29 steps
    "causal_conv1d_steps_bwd_kernel": Kernel("causal_conv1d", 256, 4, elements=(29 / 32, None), loop="main"),
    "causal_conv1d_states_fwd_kernel": Kernel("causal_conv1d", 256, 4, per="(b,d)"),
    "causal_conv1d_states_bwd_kernel": Kernel("causal_conv1d", 256, 4, per="(b,d)"),
    "causal_conv1d_shares_bwd_kernel": Kernel("causal_conv1d", 256, 4, per="(d,k)"),
    # of the scan: 16 states of a channel in a thread, two steps in an iteration; backward 32 of states times steps
    "selective_scan_fwd_kernel": Kernel(
        *("selective_scan", 128, 4, ("states", "lanes", "offset"), "(b,d,t,n)", (2, "states"), "main"),
        {"bfloat16, 16 states, 1 lanes$": 8.5, "bfloat16, 16 states, 1 lanes, offset": 9.5},
        "(2|4) lanes",
    ),
    "selective_scan_bwd_kernel": Kernel(
        *("selective_scan", 256, 2, ("states", "lanes", "offset"), "(b,d,t,n)", (32, None), "all"),
        {"bfloat16, 4 states, 4 lanes$": 32.0, "bfloat16, 4 states, 4 lanes, offset": 36.0},
        "sm_80|8 states|float32",
    ),
    "segment_kernel": Kernel(
        *("selective_scan", 128, 4, ("states", "lanes", "reverse"), "(b,d,t,n)", (1, "states"), "main"),
    ),
    "join_segments_kernel": Kernel("selective_scan", 128, 8, ("reverse",), "(b,d,n)"),
    "sum_shares_kernel": Kernel("selective_scan", 128, 8, per="(d,n)"),
    "sum_state_gradients_kernel": Kernel("selective_scan", 128, 4, per="(b,t,n)"),
    "causal_conv1d_update_kernel": Kernel("causal_conv1d_update", 256, 4, per="(b,d)"),
    # a thread has one vector of 16 states, and what it does for its channel counts too
    "selective_state_update_kernel": Kernel(
        "selective_state_update", 128, 8, ("states",), per="(b,d,n)", elements=(1, "states")
    ),
}


def count(targets: Iterable[str], sources: Iterable[Path]) -> Iterator[Row]:
    """Compile each source for each target, and count its kernels."""
    compiler = f"nvcc {re.search(r'V([0-9.]+)', _run(nvcc(), '--version'))[1]}"
    jobs = [(target, source) for target in targets for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(lambda job: _compile(*job, Path(folder)), jobs)
        # kernels without a dtype are in several files
        seen = set()
        for (target, _), cubin in zip(jobs, cubins, strict=True):
            for name in re.findall(r"Function (\S+):\s+REG", _run(sass.tool("cuobjdump"), "-res-usage", cubin)):
                if (target, name) not in seen:
                    seen.add((target, name))
                    yield _row(cubin, name, target, compiler)


def nvcc() -> str:
    """Find the CUDA compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError(
            "nvcc is neither on the PATH nor in /usr/local/cuda.\n"
            "  It compiles the CUDA kernels. Install the CUDA toolkit, or name its compiler with CUDACXX."
        )
    return found


def _compile(target: str, source: Path, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.{target}.cubin"
    _run(nvcc(), *FLAGS, f"-arch={target}", "-cubin", source, "-o", cubin)
    return cubin


def _row(cubin: Path, mangled: str, target: str, compiler: str) -> Row:
    name, dtype, values = demangle(mangled)
    expected, found = KERNELS[name], sass.read(cubin, mangled)
    arguments = dict(zip(expected.arguments, values, strict=True))
    factor, argument = expected.elements
    words = [dtype, *(f"{value} {key}" for key, value in arguments.items() if key not in FLAGS_SAID)]
    case = ", ".join(filter(None, [*words, *(key for key in FLAGS_SAID if arguments.get(key))]))
    bound = next((bound for pattern, bound in expected.bounds.items() if re.match(pattern, case)), None)
    return Row(
        *(expected.op, case, name, target, found.registers, found.stack, found.shared, found.spills),
        round(_instructions(found, expected.loop) / factor / arguments.get(argument, 1), 2),
        *(expected.per, bound, compiler),
    )


def _instructions(kernel: sass.Kernel, loop: str | None) -> int:
    if loop == "all":
        return sum(loop.instructions for loop in kernel.loops if loop.count("MUFU.EX2"))
    return max(kernel.loops, key=lambda loop: loop.count("FFMA")).instructions if loop else kernel.instructions


def demangle(mangled: str) -> tuple[str, str, list[int]]:
    """Read the name of a kernel, its dtype, and its other template arguments from a mangled name.

    Raises:
        ValueError: KERNELS has no such kernel.
    """
    name = next((name for name in KERNELS if f"{len(name)}{name}" in mangled), None)
    if name is None:
        raise ValueError(f"{mangled} is not known.\n  Say in KERNELS what is expected of it.")
    arguments = mangled.partition(f"{name}I")[2].partition("EEv")[0] + "E"
    dtype = next((title for code, title in DTYPES.items() if arguments.startswith(code)), "")
    return name, dtype, [int(value) for value in re.findall(r"L[ib](\d+)E", arguments)]


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel, in words."""
    kernel = KERNELS[row.kernel]
    found = row.faults
    if row.registers > kernel.registers and not re.search(kernel.crowded, f"{row.target}, {row.case}"):
        found.append(
            f"{row.kernel}, {row.op} {row.case}, {row.target}: {row.registers} registers, "
            f"but {kernel.blocks} blocks of {kernel.threads} threads have {kernel.registers} each"
        )
    return found


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    sources = {path.name: path for path in sorted(SOURCES.glob("*.cu")) if path.name != "runtime.cu"}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_instruction_counts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="one GPU; may be repeated")
    parser.add_argument("--source", action="append", choices=tuple(sources), help="one file; may be repeated")
    parser.add_argument("--csv", type=Path, help=f"the file to write (default: {FILE})")
    options = parser.parse_args(argv)

    rows = []
    for row in count(options.target or TARGETS, [sources[name] for name in options.source or sources]):
        rows.append(row)
        title = f"{row.target:7} {row.kernel:36} {row.case:36}"
        print(f"{title} {row.registers:4} registers {row.instructions:8.1f} per {row.per}", flush=True)
    whole = not (options.target or options.source)
    if options.csv or whole:
        write(options.csv or FILE, rows)
        print(f"{len(rows)} rows written to {options.csv or FILE}\n  next: python -m benchmarks.tables")
    found = [fault for row in rows for fault in faults(row)]
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

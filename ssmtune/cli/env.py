"""`ssmtune env`: versions, devices and kernels, to be pasted into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ssmtune import __version__

EXAMPLES = """\
examples:
  ssmtune env                    print the report
  ssmtune env --json > env.json  the same for programs
  SSMTUNE_NO_NATIVE=1 ssmtune env   what is left without the compiled kernels
"""

PACKAGES = ("torch", "transformers", "peft", "triton", "numpy", "mamba_ssm", "causal_conv1d")
OPERATORS = ("selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update", "ssd_scan")
NO_TORCH = (
    "not built: torch is not installed\n  Run `pip install torch`, then install ssmtune again to build the kernels."
)
REMEDIES = {
    "c++": "apt install g++, or set CXX to a compiler",
    "cmake": "pip install cmake",
    "ninja": "pip install ninja (without it make is used)",
    "nvcc": "install the CUDA toolkit, or name its compiler with CUDACXX",
}
VARIABLES = ("SSMTUNE_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "env",
        help="print versions, devices and available kernels",
        description="Print versions, devices and available kernels, ready to paste into a bug report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def collect() -> dict:
    """What a bug report needs to know about this installation.

    Returns:
        A dictionary of plain values: versions, platform, cpu, threads, devices, native, cuda_kernels, backends (for
        each operator, each backend's reason for not being available or None), variables.
    """
    report = {
        "ssmtune": __version__,
        "installed_at": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }
    if find_spec("torch") is None:
        native = {"loaded": False, "capability": None, "why_not": NO_TORCH, "build_tools": _build_tools()}
        cuda_kernels = {"architectures": None, "why_not": NO_TORCH}
        missing = {"threads": None, "cuda": None, "devices": [], "backends": {}}
        return {**report, **missing, "native": native, "cuda_kernels": cuda_kernels}

    import torch

    from ssmtune import native
    from ssmtune.ops import available_backends

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            )
    return {
        **report,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "native": {
            "loaded": native.is_loaded(),
            "capability": native.cpu_capability(),
            "why_not": native.why_not(),
            "build_tools": _build_tools(),
        },
        "cuda_kernels": {"why_not": native.cuda_why_not(), "architectures": native.cuda_architectures()},
        "backends": {operator: available_backends(operator) for operator in OPERATORS},
    }


def render(report: dict) -> str:
    """The report as aligned text."""
    native = report["native"]
    packages = {name: version or "not installed" for name, version in report["packages"].items()}
    rows = [
        ("ssmtune", f"{report['ssmtune']} ({report['installed_at']})"),
        ("python", report["python"]),
        ("platform", report["platform"]),
        *packages.items(),
        ("cpu", f"{report['cpu']}, {report['cpu_count']} logical cores"),
    ]
    if report["packages"]["torch"]:
        rows.append(("threads", str(report["threads"])))
        rows.append(("cuda", report["cuda"] or "none (torch is built without it)"))
        devices = report["devices"] or ["none, the CPU is used"]
        rows += [("gpu", device) for device in devices]
    tools, cuda_kernels = native["build_tools"], report["cuda_kernels"]
    if native["loaded"]:
        rows.append(("kernels", f"compiled, running {native['capability']} instructions"))
        rows.append(("cuda kernels", cuda_kernels["why_not"] or f"compiled for {cuda_kernels['architectures']}"))
        missing = ["nvcc"] if report["cuda"] and cuda_kernels["why_not"] else []
    else:
        rows.append(("kernels", native["why_not"]))
        missing = ["c++", "cmake", "ninja"]
    rows += [(f"  {name}", tools[name] or f"missing: {REMEDIES[name]}") for name in missing]
    rows += [(name, value) for name, value in report["variables"].items()]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]

    for operator, backends in report["backends"].items():
        lines.append(f"\n{operator}")
        for name, reason in backends.items():
            lines.append(f"  {name:<{width - 2}}{(reason or 'available').splitlines()[0]}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    # from the metadata: importing mamba_ssm fails where its kernels do not load
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _build_tools() -> dict[str, str | None]:
    """Where each tool is that building the kernels takes; None where it is missing."""
    beside_python = str(Path(sys.executable).parent)

    def find(*names: str) -> str | None:
        return next((p for n in names for p in (shutil.which(n), shutil.which(n, path=beside_python)) if p), None)

    nvcc = os.environ.get("CUDACXX") or find("nvcc", "/usr/local/cuda/bin/nvcc")
    compiler = find(os.environ.get("CXX", "c++"), "g++", "clang++")
    return {"c++": compiler, "cmake": find("cmake"), "ninja": find("ninja"), "nvcc": nvcc}

"""`ssmtune bench`: time the kernels against other implementations."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = {
    "selective-scan": "selective_scan",
    "training-step": "training_step",
    "causal-conv1d": "causal_conv1d",
    "decoding": "decoding",
}

EXAMPLES = """\
examples:
  ssmtune bench --quick                              one small shape, in half a minute
  ssmtune bench selective-scan                       every shape and peer, several minutes on an idle machine
  ssmtune bench training-step --csv steps.csv        a whole training step, stored in a file of yours
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels against other implementations",
        description="Time the kernels against other implementations. Needs a checkout of the repository.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", nargs="?", default="selective-scan", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="small sizes; stores nothing unless --csv is given")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    parser.add_argument("--plot", action="store_true", help="draw time against seqlen beside --csv (selective-scan)")


def run(args: argparse.Namespace) -> int:
    if args.plot and (args.csv is None or args.benchmark != "selective-scan"):
        raise ValueError(
            f"--plot draws the file named with --csv, got --csv {args.csv} and benchmark {args.benchmark}.\n"
            "  Use `ssmtune bench selective-scan --csv FILE --plot`."
        )
    folder = checkout()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    status = import_module(f"benchmarks.{BENCHMARKS[args.benchmark]}").run(quick=args.quick, csv=args.csv)
    if args.plot and status == 0:
        picture = args.csv.with_suffix(".png")
        import_module("benchmarks.plots").draw(args.csv, picture)
        print(picture)
    return status


def checkout() -> Path:
    """The root of the checkout this package runs from.

    Raises:
        RuntimeError: the package was installed without one.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "selective_scan.py").is_file():
        raise RuntimeError(
            f"the benchmarks are not installed with the package: no {root / 'benchmarks'}.\n"
            "  They need a checkout: clone the repository, then `pip install -e .` in it and run this command again."
        )
    return root

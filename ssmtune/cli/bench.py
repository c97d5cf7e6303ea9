"""`ssmtune bench`: time the operators on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

OUT = Path("runs/bench")

EXAMPLES = """\
examples:
  ssmtune bench                                 every kernel that runs here, against other implementations
  ssmtune bench --preset full --out runs/h200   more and longer sequences
  ssmtune bench --read runs/bench/bench.csv     the table and the picture of an earlier run
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels against other implementations and the machine's limits",
        description="Time the scan, the convolution and the decoding step on this machine. Each is checked against "
        "float64 first. Prints a table, and writes bench.csv and bench.png, time against seqlen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="quick", choices=("quick", "full"), help="quick (default): 2 minutes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if any")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the files go (default: {OUT})")
    parser.add_argument("--read", type=Path, metavar="CSV", help="measure nothing, read an earlier run instead")


def run(args: argparse.Namespace) -> int:
    from ssmtune.measure import results

    if args.read is not None:
        rows = results.read(args.read)
        last = max((row.timestamp for row in rows), default=None)
        report([row for row in rows if row.timestamp == last], args.read.with_suffix(".png"))
        return 0
    device = choose_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "bench.csv"
    session = measure(device, args.preset, path)
    report(session.rows, args.out / "bench.png")
    print(f"{len(session.rows)} rows appended to {path}")
    return 1 if session.wrong else 0


def choose_device(wish: str) -> str:
    """cpu or cuda.

    Raises:
        RuntimeError: a GPU was asked for and there is none.
    """
    import torch

    if wish == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"no GPU found (torch {torch.__version__}).\n  Leave out --device cuda to measure the CPU.")
    if wish != "auto":
        return wish
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(device: str, preset: str, path: Path):
    """Run a preset; its session, whose rows are in the file."""
    import torch

    from ssmtune.measure import bounds, results
    from ssmtune.measure.peers import usable
    from ssmtune.measure.plans import plan
    from ssmtune.measure.session import Session

    environment = results.environment(device)
    limits = bounds.measure(device)
    threads = torch.get_num_threads()
    print(environment, *([f"{threads} threads"] if device == "cpu" else []), limits, sep=" · ")
    for name, reason in usable(device)[1].items():
        print(f"  left out: {name}: {reason}")
    session = Session(environment, device, 0.2 if preset == "quick" else 1.0, (threads,), path, limits=limits)
    groups = plan(device, preset)
    for done, group in enumerate(groups):
        print(f"{done + 1}/{len(groups)}")
        session.measure(group)
    return session


def report(rows, picture: Path) -> None:
    """Print the table of each operator, and draw the picture where that is possible."""
    from ssmtune.measure.picture import draw
    from ssmtune.measure.table import aligned, comparison

    for op in dict.fromkeys(row.op for row in rows):
        header, body = comparison(rows, op)
        if body:
            print(f"\n{op}, {header[-1].rpartition(' ')[2]}\n{aligned(header, body)}")
    print()
    try:
        draw(rows, picture)
        print(picture)
    except (RuntimeError, ValueError) as error:
        print(f"no picture: {error}")

"""`ssmtune report`: the report of a comparison again, or one of several side by side."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  ssmtune report runs/compare-mamba-5m
  ssmtune report runs/compare-mamba-5m runs/compare-gpt-neox-5m --out runs/models

Nothing is trained: report.md, report.html, results.csv and pictures/ are made of the stored results alone.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write the report of one comparison again, or of several side by side",
        description="Write the report of one comparison again, or of several side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="the --out of an earlier `ssmtune compare`")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: DIR, if there is one)")


def run(args: argparse.Namespace) -> int:
    return show([Path(place) for place in args.directories], args.out and Path(args.out))


def show(directories: Sequence[Path], out: Path | None) -> int:
    """Write a report, print it and what to do next.

    Returns:
        The exit status: 1 if there are runs, but of no method that could be trained.
    """
    from ssmtune.report import print_report, write_report

    report = write_report(directories, out)
    print_report(report)
    pictures = f", {report.pictures[0].parent}/" if report.pictures else ""
    print(f"report   {report.markdown}, {report.html}, {report.table}{pictures}")
    trained = [
        (place / "adapters" / task.name / row.name, task.example)
        for place, study in zip(directories, report.studies, strict=True)
        for task in study.summary.tasks
        for row in task.ranked()
        if row.trainable
    ]
    for folder, example in trained:
        if folder.is_dir():
            print(f"next     ssmtune generate {shlex.quote(str(folder))} --prompt {shlex.quote(example)}")
            break
    if not trained and any(study.summary.runs for study in report.studies):
        print("ssmtune: no method could be trained; the first errors are above", file=sys.stderr)
    return 0 if trained else 1

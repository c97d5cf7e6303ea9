"""The study of docs/results.md: every base model of the package, four tasks, one budget for all methods.

    python -m benchmarks.study --data-dir data                             all of it: a day of two CPU cores
    python -m benchmarks.study --data-dir data --models mamba-5m --tasks e2e   a part of it
    python -m benchmarks.study --results benchmarks/results/study          the report of what is there, and nothing run

Each model is a comparison as `ssmtune compare` makes it, in a directory of its own in --out: stopped anywhere, the same
command goes on; models, tasks and methods can be run at different times and on different machines.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from ssmtune.comparison import ComparisonConfig, fitting_methods, run_comparison
from ssmtune.report import write_report
from ssmtune.sweep_progress import SweepProgress

MODELS = ["mamba-5m", "mamba2-5m", "gpt-neox-5m", "llama-5m"]
TASKS = ["e2e", "webnlg", "sst2", "rte"]


def comparison(model: str, tasks: list[str], methods: list[str], data_dir: str) -> ComparisonConfig:
    """What is compared on a model. A sentence's feeling takes many more steps than the form of an answer."""
    return ComparisonConfig(
        model=model,
        tasks=tasks,
        methods=methods,
        seeds=5,
        steps=120,
        task_steps={name: 480 for name in tasks if name == "sst2"},
        lr_factors=[1.0, 4.0, 16.0, 64.0, 256.0],
        search_seeds=1,
        batch_size=8,
        autocast=True,
        measures=["forgetting", "switching"],
        data_dir=data_dir,
        limit={"train": 8000, "dev": 100, "test": 280},
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/study", metavar="DIR", help="the comparisons (%(default)s)")
    parser.add_argument("--data-dir", metavar="DIR", help="the tasks' files; without it nothing is run")
    parser.add_argument("--models", default=",".join(MODELS), metavar="M,M", help="%(default)s")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="T,T", help="%(default)s")
    parser.add_argument("--methods", metavar="M,M", help="those that fit the model")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--results", metavar="DIR", help="where the report and the evidence for it go (default: --out)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if args.data_dir is not None:
        for model in args.models.split(","):
            methods = args.methods.split(",") if args.methods else fitting_methods(model)
            config = comparison(model, args.tasks.split(","), methods, args.data_dir)
            run_comparison(config, out / Path(model).name, progress=SweepProgress(), processes=args.processes)
    results = Path(args.results or out)
    finished = [place for place in (out / model for model in MODELS) if (place / "comparison.json").is_file()]
    if results != out:
        finished = [keep(place, results / place.name) for place in finished]
    report = write_report(finished, results)
    print(f"report   {report.markdown}, {report.html}")
    return 0


def keep(place: Path, kept: Path) -> Path:
    """Copy what a comparison's report is drawn from, and not the weights."""
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy2(place / "comparison.json", kept)
    shutil.copytree(place / "cells", kept / "cells", dirs_exist_ok=True)
    return kept


if __name__ == "__main__":
    sys.exit(main())

"""`ssmtune compare`: train several methods on the same budget and report."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from ssmtune.cli.allocator import keep_freed_memory
from ssmtune.comparison import ComparisonConfig, fitting_methods
from ssmtune.config import ConfigError
from ssmtune.effects import EFFECTS
from ssmtune.methods import METHODS
from ssmtune.tasks import SPLITS, TASKS

EXAMPLES = """\
examples:
  ssmtune compare mamba-5m --preset demo --out runs/demo
  ssmtune compare mamba-5m --task docstring-package --methods lora,state-offset --seeds 5 --steps 500
  ssmtune compare EleutherAI/pythia-160m --methods full,lora,prefix-tuning --out runs/pythia
  ssmtune compare mamba-5m --task e2e --data-dir data/e2e --limit train=8000,dev=200,test=200 --out runs/e2e
  ssmtune compare mamba-5m --processes 4 --out runs/study

tasks:
{tasks}

methods (docs/capabilities.md says which fits which model):
{methods}

Every method gets the same steps, batches and data order, and a learning-rate search of the same size around its own
default rate. Stopped by Ctrl-C or a crash, the same command goes on where it was; methods, seeds and tasks can be added
to a finished comparison. `ssmtune report` makes the report again, or one of several comparisons side by side.

exit status: 0 done, 1 no method could be trained, 2 wrong usage or configuration, 130 interrupted
"""

# The whole sweep takes a few minutes on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "steps": 180,
        "search_steps": 40,
        "search_seeds": 1,
        "seeds": 2,
        "batch_size": 8,
        "lr_factors": [2.0, 8.0, 64.0],
        "limit": {"dev": 64, "test": 256},
        "evaluations": 4,
    },
}


def add_parser(subparsers) -> None:
    titles = {name: method.title for name, method in METHODS.items()}
    tasks, methods = ("\n".join(f"  {name:<28}{text}" for name, text in known.items()) for known in (TASKS, titles))
    parser = subparsers.add_parser(
        "compare",
        help="train several methods on the same budget and report",
        description="Train several methods with the same number of steps and the same search for a learning rate.",
        epilog=EXAMPLES.format(tasks=tasks, methods=methods),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config = ComparisonConfig()
    parser.add_argument("model", nargs="?", help="a built-in name, a local directory or a hub name (default: mamba-5m)")
    parser.add_argument("--task", metavar="T", help="tasks, separated by commas (default: docstring-package)")
    parser.add_argument("--data-dir", metavar="DIR", help="the files of tasks that read any")
    parser.add_argument("--methods", metavar="M,M", help=f"default: those of {','.join(config.methods)} that fit")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"final runs per method (default: {config.seeds})")
    parser.add_argument(
        "--steps", metavar="N", help=f"steps of a final run, as N or N,TASK=N,TASK=N (default: {config.steps})"
    )
    parser.add_argument("--search-steps", type=int, metavar="N", help="steps of a search run (default: a third)")
    parser.add_argument("--search-seeds", type=int, metavar="N", help="runs per rate in the search (default: 2)")
    parser.add_argument(
        "--lr-grid",
        metavar="F,F",
        help="factors on each method's default learning rate (default: 1,8,64); a single one: no search",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"examples per step (default: {config.batch_size})")
    parser.add_argument("--warmup", type=float, metavar="X", help=f"share of the steps (default: {config.warmup})")
    parser.add_argument(
        "--autocast",
        action="store_true",
        default=None,
        help="train in bfloat16 from float32 weights: faster where the processor can",
    )
    parser.add_argument("--evaluations", type=int, metavar="N", help="dev losses along a final run (default: 5)")
    parser.add_argument(
        "--measure",
        metavar="E,E",
        help=f"what is measured besides the score: {', '.join(EFFECTS)} (default: all); `none` for nothing",
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text for that, plain or JSONL (default: a short one)")
    parser.add_argument("--ood-task", metavar="T", help="whose inputs `ood` tells apart (default: pieces of the text)")
    parser.add_argument("--limit", metavar="N", help="at most so many examples per split, as N or N,SPLIT=N,SPLIT=N")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a budget: demo takes minutes on two CPU cores")
    parser.add_argument("--out", metavar="DIR", help="directory of the comparison (default: runs/compare-MODEL)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh if --out holds a comparison")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs made at a time (default: 1)")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="make them on a Ray cluster: the one of this machine, one by its address, or `local` for a new one here",
    )
    parser.add_argument("--import", dest="imports", metavar="M,M", help="modules with methods and tasks of your own")
    parser.add_argument("--backend", metavar="B", help="cuda, triton, cpu or reference, or auto (the default)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the report at the end")


def run(args: argparse.Namespace) -> int:
    config = resolve(args)
    config.check()
    if args.methods is None:
        config.methods = fitting_methods(config.model, config.methods)
    out = Path(args.out or f"runs/compare-{Path(config.model).name}")

    keep_freed_memory()
    import transformers

    from ssmtune.cli.train import backend_for
    from ssmtune.comparison import run_comparison
    from ssmtune.sweep_progress import SweepProgress

    transformers.utils.logging.disable_progress_bar()
    try:
        with backend_for(args.backend):
            run_comparison(
                config,
                out,
                overwrite=args.overwrite,
                progress=SweepProgress(enabled=not args.quiet),
                processes=args.processes,
                ray=args.ray,
            )
    except KeyboardInterrupt:
        again = shlex.join(argument for argument in sys.argv[1:] if argument != "--overwrite")
        print(f"\nssmtune: interrupted; finished runs are kept in {out}\n  To go on: ssmtune {again}", file=sys.stderr)
        return 130
    from ssmtune.cli.report import show
    from ssmtune.disk_space import room_in

    with room_in(out):
        return show([out], out)


def resolve(args: argparse.Namespace) -> ComparisonConfig:
    """The configuration: the defaults, the preset over them, the flags over both."""
    values: dict[str, Any] = dict(PRESETS[args.preset]) if args.preset else {}
    steps, task_steps = _counts("--steps", args.steps, "100,sst2=400")
    every_split, limit = _counts("--limit", args.limit, "500,train=8000")
    flags = {
        "model": args.model,
        "data_dir": args.data_dir,
        "seeds": args.seeds,
        "search_steps": args.search_steps,
        "search_seeds": args.search_seeds,
        "batch_size": args.batch_size,
        "warmup": args.warmup,
        "autocast": args.autocast,
        "evaluations": args.evaluations,
        "measures": [] if args.measure == "none" else _names(args.measure),
        "text": args.text,
        "ood_task": args.ood_task,
        "tasks": _names(args.task),
        "methods": _names(args.methods),
        "imports": _names(args.imports),
        "lr_factors": _numbers(args.lr_grid),
        "steps": steps,
        "task_steps": task_steps,
        "limit": limit if every_split is None else dict.fromkeys(SPLITS, every_split) | limit,
    }
    values |= {key: value for key, value in flags.items() if value is not None}
    return dataclasses.replace(ComparisonConfig(), **values)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--lr-grid: expected numbers such as 0.333,1,3, got {text!r}.") from None


def _counts(flag: str, text: str | None, example: str) -> tuple[int | None, dict[str, int] | None]:
    """The number without a name in N,NAME=N,NAME=N, if there is one, and those by name; twice None for no text."""
    if text is None:
        return None, None
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        readable = number.isdecimal() and bool(name) == bool(equals)
        if not readable or name in counts:
            raise ConfigError(
                f"{flag}: {part.strip()!r} is not understood: "
                f"{'another number is given for the same' if readable else 'it is neither N nor NAME=N'}.\n"
                f"  Give one number for all, others by name, or both: {flag} {example}."
            )
        counts[name] = int(number)
    return counts.pop("", None), counts

"""`ssmtune train`: fine-tune a model with one method."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ssmtune.cli.allocator import keep_freed_memory
from ssmtune.cli.config_flags import add_flags, flag_values, help_of
from ssmtune.config import ConfigError, RunConfig
from ssmtune.config_files import load_config, to_dict, to_yaml
from ssmtune.extensions import import_modules
from ssmtune.methods import get_method, method_options
from ssmtune.models import resolve_model

EXAMPLES = """\
examples:
  ssmtune train mamba-5m --method state-offset --data poems.jsonl --out runs/poems
  ssmtune train --config mamba-5m/lora.yaml --data poems.jsonl --train.steps 200 --train.lr 1e-3
  ssmtune train --resume --out runs/poems

The data is JSONL or CSV with the columns prompt and completion, or whatever --data.template and --data.target name:
  ssmtune train --data words.csv --data.template '{word} means' --data.target meaning
Or it is that of a task, which `ssmtune compare --help` lists:
  ssmtune train mamba-5m --method lora --task e2e --data-dir data/e2e --out runs/e2e
Texts that memory does not hold at once go through in chunks, with the state carried on:
  ssmtune train mamba-5m --method state-offset --data books.jsonl --data.max_length 100000 --train.chunk_length 2000

exit status: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted
"""


TRACKERS = ("tensorboard", "trackio", "wandb")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model with one method",
        description="Fine-tune a model with one method.",
        usage="ssmtune train [MODEL] [--config FILE] [--method M] [--data PATH | --task T] [--out DIR] [--KEY VALUE]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a built-in name, a directory or a hub name")
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a recipe such as mamba-5m/lora.yaml")
    parser.add_argument("--method", dest="method.name", metavar="M", help=help_of("method.name"))
    parser.add_argument("--data", dest="data.path", metavar="PATH", help=help_of("data.path"))
    parser.add_argument("--task", dest="data.task", metavar="T", help=help_of("data.task"))
    parser.add_argument("--data-dir", dest="data.dir", metavar="DIR", help=help_of("data.dir"))
    parser.add_argument("--out", metavar="DIR", help=help_of("out"))
    parser.add_argument("--import", dest="imports", metavar="M,M", help=help_of("imports"))
    parser.add_argument("--backend", metavar="B", help="cuda, triton, cpu or reference, or auto (the default)")
    parser.add_argument("--log", choices=TRACKERS, help="follow the run in this program too; it has to be installed")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, with the memory, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the report at the end")
    group = parser.add_argument_group("configuration", "every key of the configuration file")
    add_flags(group, RunConfig, skip=("method.name", "data.path", "data.task", "data.dir"))


def run(args: argparse.Namespace) -> int:
    config = _resolve(args)
    method = get_method(config.method.name)
    options = method_options(config.method)
    from ssmtune.run_directory import RunDirectory, write_whole

    directory = RunDirectory(Path(config.out))
    tracker = _tracker(args.log, directory.path)
    keep_freed_memory()
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun or accelerate launch
    if first and not args.dry_run:
        directory.check(resume=args.resume, overwrite=args.overwrite)
    if args.resume and directory.summary.is_file():
        print(f"{directory.path} is finished. Nothing to resume.\nnext     {_next_command(directory.path)}")
        return 0
    resolve_model(config.model)
    train_examples, dev_examples = _load_data(config)

    import torch

    from ssmtune.methods import apply_method
    from ssmtune.models import load_model

    model, tokenizer = load_model(config.model, config.train.dtype)
    if torch.cuda.is_available():
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    model = apply_method(model, method.name, options, config.train.seed)
    with backend_for(args.backend):
        if first:
            _print_plan(config, method, model, tokenizer, train_examples, dev_examples, args.dry_run)
        if args.dry_run:
            return 0
        from ssmtune.training import TrainingInterrupted, train

        if first:
            directory.prepare(resume=args.resume)
            write_whole(directory.config, to_yaml(config))
        try:
            result = train(
                model,
                tokenizer,
                train_examples,
                dev_examples,
                config.train,
                directory.path,
                max_length=config.data.max_length,
                evaluation=config.eval,
                callbacks=tracker,
                resume=args.resume,
                progress=first and not args.quiet,
            )
        except TrainingInterrupted as stopped:
            print(
                f"\nssmtune: interrupted after step {stopped.step}; saved {stopped.checkpoint}\n"
                f"  To go on: ssmtune train --resume --out {directory.path}",
                file=sys.stderr,
            )
            return 130
    if first:
        _print_report(directory, result)
    return 0


def _tracker(name: str | None, out: Path) -> list:
    """The callback of transformers that follows a run in another program; none without a name."""
    if name is None:
        return []
    if find_spec(name) is None:
        raise ConfigError(
            f"--log {name} was given, but {name} is not installed.\n"
            "  metrics.jsonl and loss.png in the run directory are written in any case.\n"
            f"  Run `pip install {name}`, or leave --log out."
        )
    from transformers.integrations import get_reporting_integration_callbacks

    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "tensorboard"))
    return [callback() for callback in get_reporting_integration_callbacks([name])]


def _load_data(config: RunConfig) -> tuple[list, list]:
    from ssmtune.data import hold_out, load_examples
    from ssmtune.tasks import load_task

    data = config.data
    if data.task is not None:
        if data.path is not None or data.dev_path is not None:
            raise ConfigError(
                f"data.task is {data.task!r}, and data.path or data.dev_path is set too.\n"
                "  A task brings its own examples to train on and to hold out. Give --task or --data."
            )
        task = load_task(data.task, data.dir, data.limit and {"train": data.limit})
        return task.train, task.dev
    if data.path is None:
        raise ConfigError(
            "data.path is not set.\n  Give the training examples with --data FILE, or a task with --task."
        )
    examples = load_examples(data.path, data.template, data.target, split=data.split, limit=data.limit)
    if data.dev_path is None:
        return hold_out(examples, data.dev_fraction, config.train.seed)
    return examples, load_examples(data.dev_path, data.template, data.target, split=data.split)


def _resolve(args: argparse.Namespace) -> RunConfig:
    """The configuration of this run: of the file, with the flags over it; of the run directory when resuming."""
    overrides = flag_values(args, RunConfig)
    if not args.resume:
        config = load_config(args.config, overrides)
        import_modules(config.imports)
        method = get_method(config.method.name)
        if config.out is None:
            config.out = f"runs/{Path(config.model).name}-{method.name}"
        if config.train.lr is None and config.train.optimizer == "mezo":
            raise ConfigError(
                f"train.lr is not set, and the default of {method.name} is one for AdamW.\n"
                "  MeZO wants a small one: its authors take 1e-6 for all weights, 5e-5 for LoRA. Set --train.lr."
            )
        if config.train.lr is None:
            config.train.lr = method.default_lr
        return config
    if args.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other.\n  Give one of them.")
    out = overrides.get("out") or (load_config(args.config, overrides).out if args.config else None)
    if out is None:
        raise ConfigError("--resume needs to know which run to go on with.\n  Give its directory with --out.")
    stored = Path(out) / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"{out} is not a run directory: it has no config.yaml.\n  Start the run without --resume.")
    config = load_config(stored)
    import_modules(config.imports)
    wanted = to_dict(load_config(stored, {key: value for key, value in overrides.items() if key != "out"}))
    if differing := _differing(to_dict(config), wanted):
        raise ConfigError(
            f"--resume goes on with {stored}, but there are other values for {', '.join(differing)}.\n"
            "  Leave them out, or start another run."
        )
    config.out = out
    return config


def _differing(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in wanted.items():
        if isinstance(value, dict):
            keys += _differing(stored[key], value, f"{prefix}{key}.")
        elif stored[key] != value:
            keys.append(f"{prefix}{key}")
    return keys


def backend_for(name: str | None):
    """A context in which the operators run on the backend of that name; None and `auto` leave the choice to them."""
    from contextlib import nullcontext

    from ssmtune import ops

    return ops.backend(name) if name not in (None, "auto") else nullcontext()


def _print_plan(config: RunConfig, method, model, tokenizer, train_examples, dev_examples, dry_run: bool) -> None:
    from ssmtune.data import encode_all
    from ssmtune.memory import estimate_bytes, readable
    from ssmtune.weights import parameter_counts

    trainable, total = parameter_counts(model)
    data = encode_all(tokenizer, train_examples, config.data.max_length)
    longest = max(len(item.input_ids) for item in data.items)
    settings = config.train
    forward_only = settings.optimizer == "mezo"
    at_once = min(longest, settings.chunk_length or longest)
    estimate = estimate_bytes(model, settings.batch_size, at_once, settings.gradient_checkpointing, forward_only)
    per_step = config.train.batch_size * config.train.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    passes = config.train.steps * per_step / len(data)
    rows = [
        ("model", config.model),
        ("method", f"{method.title}, {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)"),
        ("backend", _backends_in_words(model)),
        ("data", f"{len(data):,} examples of {data.tokens:,} tokens, longest {longest}; dev {len(dev_examples):,}"),
        ("steps", f"{config.train.steps:,} of {per_step} examples ({passes:.1f} passes), rate {config.train.lr:g}"),
        ("memory", f"about {readable(estimate)} for a step"),
        ("out", config.out),
    ]
    if dry_run:
        print(to_yaml(config).rstrip() + "\n")
    print("\n".join(f"{name:<8} {text}" for name, text in rows), flush=True)
    if dry_run:
        if cut := data.cut_report(config.data.max_length):
            print(f"warning: {cut}")
        print("dry run: nothing was written")


def _backends_in_words(model) -> str:
    from ssmtune.mixers import find_mixers, patch

    return str(patch(model)) if find_mixers(model) else "transformers (no mixer that ssmtune knows)"


def _print_report(directory, result) -> None:
    from ssmtune.memory import readable

    weights = directory.adapter if directory.adapter.is_dir() else directory.model
    size = sum(path.stat().st_size for path in weights.rglob("*.safetensors"))
    dev = "none" if result.dev_loss is None else f"{result.dev_loss:.4f}"
    if result.kept_step != result.steps:
        dev += f" (weights of step {result.kept_step}, the best)"
    written = ", ".join(path.name + "/" * path.is_dir() for path in sorted(directory.path.iterdir()))
    print(
        f"\ndone     {result.steps:,} steps in {timedelta(seconds=round(result.seconds))},"
        f" {result.tokens_per_second:,.0f} tokens/s\n"
        f"loss     training {result.train_loss:.4f}, dev {dev}\n"
        f"memory   peak {readable(result.peak_memory_bytes)}\n"
        f"weights  {weights} ({readable(size)})\n"
        f"files    {directory.path}: {written}\n"
        f"next     {_next_command(directory.path)}"
    )


def _next_command(out: Path) -> str:
    return f'ssmtune generate {out} --prompt "..."'

"""`ssmtune generate`: continue prompts with a model, or with what a run has made of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssmtune.config import ConfigError
from ssmtune.extensions import import_modules

EXAMPLES = """\
examples:
  ssmtune generate runs/poems --prompt "The sea"
  ssmtune generate runs/poems --base --prompt "The sea"
  ssmtune generate mamba-5m --prompt-file prompts.txt --max-new-tokens 100 --temperature 0.8
  ssmtune generate --adapters runs --prompts prompts.jsonl --out texts.jsonl

A prompt file has one prompt in each line. With a single prompt the text alone is printed. With --adapters each line
names the adapter that continues it, {"prompt": "The sea", "adapter": "poems"}, or none for the base; all share batches.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate text, with or without an adapter",
        description="Continue prompts with a model, a run directory or an adapter directory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL|RUN",
        help="a model, a run directory, or an adapter directory; with --adapters the base, if not the one they name",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", action="append", help="the text to continue; may be given again")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with one prompt in each line; - reads stdin")
    prompt.add_argument("--prompts", metavar="FILE", help="with --adapters: JSONL with prompt and adapter in each line")
    parser.add_argument("--adapters", metavar="DIR", help="directory of adapters or runs that --prompts names")
    parser.add_argument("--out", metavar="FILE", help="with --adapters: write JSONL there rather than print it")
    parser.add_argument("--base", action="store_true", help="leave the adapter out")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="sample from the likeliest share P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: 16")
    parser.add_argument("--import", dest="imports", metavar="M,M", help="modules with a method of your own")
    parser.add_argument("--backend", metavar="B", help="cuda, triton, cpu or reference, or auto (the default)")


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    import_modules(filter(None, (args.imports or "").split(",")))
    return _continue(args) if args.adapters is None else _continue_by_adapters(args)


def _check_usage(args: argparse.Namespace) -> None:
    if (args.prompts is None) != (args.adapters is None):
        args.command.error("--adapters and --prompts go together: a directory of adapters, and prompts that name them")
    if args.adapters is None and args.model is None:
        args.command.error("the following arguments are required: MODEL|RUN")
    if args.adapters is None and args.out is not None:
        args.command.error("--out goes with --adapters; redirect what is printed instead")
    if args.adapters is not None and args.base:
        args.command.error("--base does not go with --adapters: leave the adapter out of the lines of --prompts")


def _continue(args: argparse.Namespace) -> int:
    from ssmtune.stored_adapters import load_trained

    prompts = args.prompt if args.prompt is not None else _read_prompts(args.prompt_file)
    texts = _generate(args, *load_trained(args.model, base_only=args.base), prompts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if len(prompts) > 1 and number:
            print()
        print(f"{prompt}{text}")
    return 0


def _continue_by_adapters(args: argparse.Namespace) -> int:
    from ssmtune.adapter_directory import find_adapters, load_directory, read_prompts
    from ssmtune.progress import CountLine
    from ssmtune.run_directory import write_whole

    if args.out and not Path(args.out).parent.is_dir():
        raise ConfigError(
            f"--out {args.out}: its directory does not exist.\n  Make it: mkdir -p {Path(args.out).parent}"
        )
    rows = read_prompts(args.prompts)
    folders = find_adapters(args.adapters, rows)
    model, tokenizer = load_directory(folders, args.model)
    names = [row.adapter for row in rows] if folders else None
    with CountLine(len(rows), "prompt") as line:
        texts = _generate(args, model, tokenizer, [row.prompt for row in rows], adapters=names, progress=line.add)
    results = (
        {"prompt": row.prompt, "adapter": row.adapter, "text": text} for row, text in zip(rows, texts, strict=True)
    )
    content = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    if args.out:
        write_whole(Path(args.out), content)
        print(f"texts    {args.out} ({len(rows)}, by {len(folders)} adapters)")
    else:
        print(content, end="")
    return 0


def _generate(args: argparse.Namespace, model, tokenizer, prompts: list[str], **options) -> list[str]:
    import torch

    from ssmtune.cli.train import backend_for
    from ssmtune.generation import generate_texts

    if torch.cuda.is_available():
        model.to("cuda")
    with backend_for(args.backend):
        return generate_texts(
            model,
            tokenizer,
            prompts,
            args.max_new_tokens,
            args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            **options,
        )


def _read_prompts(name: str) -> list[str]:
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"prompt file {name}: no such file.\n  Check --prompt-file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {name} cannot be read: {error}.\n  Give a text file in UTF-8.") from None
    prompts = [line for line in content.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt file {name} holds no prompt.\n  Write one prompt in each line.")
    return prompts


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return value

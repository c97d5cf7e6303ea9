"""Entry point of the `ssmtune` command.

Nothing here, nor in any verb's add_parser, imports torch: `ssmtune --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from ssmtune import __version__

VERBS = ("train", "compare", "report", "generate", "bench", "env", "recipes")

EXAMPLES = """\
examples:
  ssmtune train mamba-5m --method state-offset --data poems.jsonl --out runs/poems
  ssmtune compare mamba-5m --task docstring-package --out runs/compare
  ssmtune generate runs/poems --prompt "The sea"

`ssmtune <command> --help` shows the options of one command.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssmtune",
        description="Parameter-efficient fine-tuning of state-space models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssmtune {__version__}")
    parser.set_defaults(debug=False)
    subparsers = parser.add_subparsers(dest="verb", metavar="<command>", required=True, title="commands")
    for verb in VERBS:
        import_module(f"ssmtune.cli.{verb}").add_parser(subparsers)
        command = subparsers.choices[verb]
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error instead of its message alone"
        )
        command.set_defaults(command=command)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; an option that does not exist is answered with the nearest that does."""
    from ssmtune.config import nearest

    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        options = [name for name in args.command._option_string_actions if name.startswith("--")]
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(option, options)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted.
    """
    args = parse(argv)
    try:
        status = import_module(f"ssmtune.cli.{args.verb}").run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # the reader (head, less) has gone; keep the interpreter from complaining about stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("ssmtune: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if args.debug or package in ("", "ssmtune"):
            raise
        print(f"ssmtune: error: {error.name} is not installed.\n  Run `pip install {package}`.", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        if args.debug:
            traceback.print_exc()
            return _status(error)
        message = str(error) or type(error).__name__
        print(message if message.startswith("config is not valid") else f"ssmtune: error: {message}", file=sys.stderr)
        return _status(error)


def _status(error: Exception) -> int:
    from ssmtune.config import ConfigError

    return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())

"""`ssmtune recipes`: list, show or copy the configurations in the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssmtune.config import ConfigError
from ssmtune.config_files import find_recipe, recipe_names

EXAMPLES = """\
examples:
  ssmtune recipes
  ssmtune recipes show mamba-5m/lora.yaml
  ssmtune recipes copy mamba-5m/lora.yaml my.yaml
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="list, show or copy the built-in recipes",
        description="List, show or copy the built-in recipes, which --config also takes by name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", nargs="?", choices=("ls", "show", "copy"), default="ls")
    parser.add_argument("name", nargs="?", help="of a recipe, such as mamba-5m/lora.yaml")
    parser.add_argument("destination", nargs="?", type=Path, help="file or directory to copy to (default: here)")


def run(args: argparse.Namespace) -> int:
    if args.action == "ls":
        for name in recipe_names():
            title = find_recipe(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{name:<32} {title}")
        return 0
    if args.name is None:
        raise ConfigError(f"recipes {args.action} needs a name.\n  Recipes: {', '.join(recipe_names())}.")
    recipe = find_recipe(args.name)
    content = recipe.read_text(encoding="utf-8")
    if args.action == "show":
        print(content, end="")
        return 0
    destination = args.destination or Path(recipe.name)
    if destination.is_dir():
        destination /= recipe.name
    if destination.exists():
        raise ConfigError(f"{destination} already exists.\n  Give another destination.")
    destination.write_text(content, encoding="utf-8")
    print(f"wrote {destination}\nnext: ssmtune train --config {destination}")
    return 0

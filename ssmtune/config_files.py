"""Configurations as YAML: strict where it is read, and the recipes that come with the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ssmtune.config import ConfigError, RunConfig, nearest
from ssmtune.config_values import fill

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, schema: type[T] = RunConfig
) -> T:
    """Read a YAML file, lay dotted overrides (`{"train.lr": "5e-3"}`) over it, and check everything at once.

    Args:
        path: YAML file, or the name of a built-in recipe; None for the defaults alone.
        overrides: dotted key -> value or text; None values are ignored.
        schema: the dataclass to fill.

    Raises:
        ConfigError: with one line for each problem.
    """
    values = read_yaml(path) if path is not None else {}
    problems: list[str] = []
    for key, value in (overrides or {}).items():
        if value is not None:
            _insert(values, key, value, problems)
    config = fill(schema, values, "", problems)
    if problems:
        name = f"config {path}" if path is not None else "config"
        raise ConfigError(f"{name} is not valid:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; a key given twice is an error, since YAML itself would drop the first."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    file = find_recipe(path)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config {path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}.\n"
            "  Correct that line; `ssmtune recipes show NAME` prints a working example."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not a text file.\n  Give a YAML file in UTF-8.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config {path} holds a {type(content).__name__}, expected keys and values.\n"
            "  Start with a line such as `model: mamba-5m`."
        )
    return content


def find_recipe(path: str | Path) -> Path:
    """A file of that name, else the built-in recipe of that name.

    Raises:
        ConfigError: there is neither; names the nearest recipe.
    """
    file = Path(path)
    if file.is_file():
        return file
    known = recipe_names()
    for candidate in (str(path), f"{path}.yaml"):
        if candidate in known:
            return RECIPES / candidate
    raise ConfigError(
        f"config {path}: no such file and no built-in recipe of that name{nearest(str(path), known)}\n"
        f"  Built-in recipes: {', '.join(known) or 'none'}."
    )


def recipe_names() -> list[str]:
    """Names of the recipes in the package, such as `mamba-5m/lora.yaml`."""
    return sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=1000)


def _insert(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            problems.append(f"{section}: expected a section, got {inner!r}")
            return
        values = inner
    values[name] = value

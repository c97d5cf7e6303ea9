"""The flags of a configuration: a dotted one for each of its keys."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from ssmtune.config import RunConfig
from ssmtune.config_values import without_none


def add_flags(parser: argparse.ArgumentParser, schema: type = RunConfig, skip: Iterable[str] = ()) -> None:
    """Add `--section.key` for every key of a schema that has sections, except those in `skip`."""
    for key, hint, spec in _leaves(schema):
        if key in skip or "." not in key:
            continue
        text = spec.metadata.get("help", "")
        default = _default(spec)
        if default is not None and default != []:
            text += f" (default: {default})"
        extra: dict[str, Any] = {"metavar": key.rsplit(".", 1)[1].upper()}
        if without_none(hint) is bool:
            extra = {"nargs": "?", "const": "true", "metavar": "true|false"}
        parser.add_argument(f"--{key}", dest=key, help=text.replace("%", "%%"), **extra)


def flag_values(args: argparse.Namespace, schema: type = RunConfig) -> dict[str, Any]:
    """The dotted overrides that were given on the command line."""
    given = vars(args)
    return {key: given[key] for key, _, _ in _leaves(schema) if given.get(key) is not None}


def help_of(key: str, schema: type = RunConfig) -> str:
    """The help text of a dotted key."""
    return next(spec.metadata["help"] for name, _, spec in _leaves(schema) if name == key)


def _leaves(schema: type, prefix: str = "") -> Iterable[tuple[str, Any, dataclasses.Field]]:
    hints = typing.get_type_hints(schema)
    for spec in dataclasses.fields(schema):
        hint = hints[spec.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", hint, spec


def _default(spec: dataclasses.Field) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else None

"""Plain values as the fields of a dataclass: each as the type that it declares, within its checks."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ssmtune.config import nearest

T = TypeVar("T")


def fill(schema: type[T], values: Mapping[str, Any], prefix: str, problems: list[str]) -> T:
    """Make a dataclass of plain values, and note what is wrong with them.

    Args:
        schema: the dataclass.
        values: by field; those of a field that is a dataclass are a mapping.
        prefix: what comes before a field in its dotted name.
        problems: gets one line for each problem.
    """
    hints = typing.get_type_hints(schema)
    specs = {spec.name: spec for spec in dataclasses.fields(schema)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in specs:
            problems.append(f"{name}: unknown key{nearest(key, specs)}")
            continue
        hint, spec = hints[key], specs[key]
        if dataclasses.is_dataclass(hint):
            if value is None:
                value = {}
            if isinstance(value, str) and "name" in {f.name for f in dataclasses.fields(hint)}:
                value = {"name": value}  # `method: lora` is short for `method: {name: lora}`
            if not isinstance(value, Mapping):
                problems.append(f"{name}: expected a section, got {value!r}")
                continue
            arguments[key] = fill(hint, value, f"{name}.", problems)
            continue
        try:
            arguments[key] = _coerce(value, hint)
            _check(arguments[key], spec.metadata)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return schema(**arguments)


def without_none(hint: Any) -> Any:
    """The X of `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _coerce(value: Any, hint: Any) -> Any:
    inner = without_none(hint)
    if inner is not hint and (value is None or value in ("none", "null")):
        return None
    if value is None:
        raise ValueError(f"expected {_name(inner)}, got nothing")
    if typing.get_origin(inner) in (list, tuple):
        kind = typing.get_args(inner)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            value = [value]
        return typing.get_origin(inner)(_coerce(part, kind) for part in value)
    if inner is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
    elif inner is int and not isinstance(value, bool):
        try:
            number = float(value)
            if number == int(number):
                return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif inner is float and not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (TypeError, ValueError):
            pass
    elif inner is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif inner is typing.Any:
        return value
    raise ValueError(f"expected {_name(inner)}, got {value!r}")


def _name(kind: Any) -> str:
    return {int: "int", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _check(value: Any, checks: Mapping[str, Any]) -> None:
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if part is None:
            continue
        if "choices" in checks and part not in checks["choices"]:
            known = checks["choices"]
            raise ValueError(f"expected one of {', '.join(map(str, known))}, got {part!r}{nearest(part, known)}")
        if "minimum" in checks and part < checks["minimum"]:
            raise ValueError(f"expected at least {checks['minimum']}, got {part}")
        if "above" in checks and part <= checks["above"]:
            raise ValueError(f"expected more than {checks['above']}, got {part}")
        if "maximum" in checks and part > checks["maximum"]:
            raise ValueError(f"expected at most {checks['maximum']}, got {part}")

"""Configuration: dataclasses, strict YAML, and the dotted command-line flags generated from them.

Nothing here imports torch, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""


def _option(default: Any, help: str, **checks: Any) -> Any:
    """A dataclass field with its help text and its checks (`minimum`, `above`, `maximum`, `choices`)."""
    metadata = {"help": help, **checks}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MethodConfig:
    name: str = _option("state-offset", "a method by name, such as full, lora or initial-state (docs/methods.md)")
    rank: int | None = _option(None, "rank of LoRA, or of a low-rank state method (default: 8, or dense)", minimum=1)
    alpha: float | None = _option(None, "LoRA scale times rank (default: the rank)", above=0)
    dropout: float | None = _option(None, "of LoRA, or of a low-rank state (default: 0)", minimum=0, maximum=0.9)
    target_modules: list[str] | None = _option(None, "modules that get LoRA (default: see docs/methods.md)")
    layers: list[int] | None = _option(None, "layers to adapt (default: all)", minimum=0)
    conv_state: bool | None = _option(None, "learn what the convolution sees left of the first token too")
    inference_scale: float | None = _option(
        None, "times the trained initial state is taken once training is over (default: 1)", above=0
    )
    reparametrize: int | None = _option(
        None, "train a state or virtual tokens through an MLP with so many hidden units", minimum=1
    )
    virtual_tokens: int | None = _option(None, "of prompt, P-, prefix or suffix tuning (default: 16)", minimum=1)
    extra_states: int | None = _option(None, "states per channel that additional-scan adds (default: 8)", minimum=1)
    channels: float | None = _option(None, "share of the channels that sdt trains (default: 0.01)", above=0, maximum=1)
    states: float | None = _option(None, "share of their states that sdt trains (default: 0.1)", above=0, maximum=1)
    warm_up_steps: int | None = _option(None, "steps after which sdt chooses them (default: 50)", minimum=1)
    last_layers: int | None = _option(None, "how many of the last layers are trained (default: 2)", minimum=1)


@dataclass
class DataConfig:
    path: str | None = _option(None, "training examples: a JSONL or CSV file, or a dataset name on the hub")
    task: str | None = _option(
        None, "a task of `ssmtune compare` by name, in the place of a path: its train and dev examples"
    )
    dir: str | None = _option(None, "the files of a task that reads any, or a dataset on the hub")
    dev_path: str | None = _option(None, "held-out examples; without it a part of the training examples is held out")
    dev_fraction: float = _option(0.05, "share held out when there is no dev_path; 0 for none", minimum=0, maximum=0.5)
    split: str = _option("train", "split of a dataset on the hub")
    template: str = _option("{prompt}", "the prompt, with {column} for the columns of the data; '' for none")
    target: str = _option("completion", "the column to be learnt, or a template with {column} in it")
    max_length: int = _option(512, "longest example in tokens; longer prompts lose their beginning", minimum=2)
    limit: int | None = _option(None, "read at most this many examples", minimum=1)


@dataclass
class TrainConfig:
    steps: int = _option(1000, "optimizer steps", minimum=1)
    batch_size: int = _option(8, "examples per step and device", minimum=1)
    accumulation: int = _option(1, "batches per optimizer step", minimum=1)
    lr: float | None = _option(None, "peak learning rate (default: the method's own)", above=0)
    optimizer: str = _option(
        "adamw", "adamw, or mezo: forward passes alone, in the memory of inference; needs lr", choices=("adamw", "mezo")
    )
    eps: float = _option(1e-3, "of mezo: how far it looks in both directions", above=0)
    warmup: float = _option(0.05, "share of the steps in which the rate rises", minimum=0, maximum=1)
    schedule: str = _option(
        "linear", "how the rate goes on then: it falls linearly to 0, or stays", choices=("linear", "constant")
    )
    weight_decay: float = _option(0.0, "AdamW weight decay", minimum=0)
    l2: float = _option(0.0, "times the sum of squares of what is trained is added to what is minimised", minimum=0)
    clip: float = _option(1.0, "largest gradient norm", above=0)
    seed: int = _option(0, "seed of initialisation, data order and dropout", minimum=0)
    dtype: str = _option(
        "float32",
        "type of the model's weights; adapters and the copies that weights are updated in are float32",
        choices=("float32", "bfloat16"),
    )
    autocast: bool = _option(False, "compute in bfloat16 from float32 weights: faster where the processor can")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass: slower, less memory")
    chunk_length: int | None = _option(
        None, "run so many tokens at once, from the state that those before them left: texts of any length", minimum=2
    )
    chunk_gradients: str = _option(
        "exact",
        "with chunk_length: exact, or truncated at the borders of chunks, which takes a forward pass less",
        choices=("exact", "truncated"),
    )
    log_every: int = _option(10, "steps between lines of metrics.jsonl", minimum=1)
    save_every: int | None = _option(None, "steps between checkpoints (default: eval.every)", minimum=1)
    keep: str = _option(
        "last", "which weights the run ends with: the last, or those of the best dev loss", choices=("last", "best")
    )


@dataclass
class EvalConfig:
    every: int = _option(100, "steps between dev losses", minimum=1)
    batch_size: int = _option(16, "examples per batch of evaluation", minimum=1)
    samples: int = _option(2, "dev prompts continued at each evaluation, for samples.md", minimum=0)
    max_new_tokens: int = _option(48, "longest sample in tokens", minimum=1)


@dataclass
class RunConfig:
    model: str = _option("mamba-5m", "a built-in name, a local directory or a model name on the hub")
    out: str | None = _option(None, "run directory (default: runs/MODEL-METHOD)")
    imports: list[str] = _option([], "modules that register a method of your own (docs/extending.md)")
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


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
    config = _fill(schema, values, "", problems)
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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of the known names, or nothing."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


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
        if _inner(hint) is bool:
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


def _insert(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            problems.append(f"{section}: expected a section, got {inner!r}")
            return
        values = inner
    values[name] = value


def _fill(schema: type[T], values: Mapping[str, Any], prefix: str, problems: list[str]) -> T:
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
            arguments[key] = _fill(hint, value, f"{name}.", problems)
            continue
        try:
            arguments[key] = _coerce(value, hint)
            _check(arguments[key], spec.metadata)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return schema(**{key: value for key, value in arguments.items()})


def _inner(hint: Any) -> Any:
    """The X of `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _coerce(value: Any, hint: Any) -> Any:
    inner = _inner(hint)
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

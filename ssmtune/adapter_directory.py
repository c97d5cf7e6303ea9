"""A directory of adapters of one base model, which continue prompts together: each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError, nearest
from ssmtune.rows import json_rows

if TYPE_CHECKING:
    from torch import nn

# What takes `adapter_names`. peft passes over them, without a word, in most of its other methods.
MIXED = ("STATE_OFFSET", "INITIAL_STATE", "ADDITIONAL_SCAN", "LORA")
_SHOWN = 8


@dataclass(frozen=True)
class AdapterPrompt:
    """A text to continue, and which adapter does: a name in the directory, or None for the base."""

    prompt: str
    adapter: str | None
    where: str


def read_prompts(file: str | Path) -> list[AdapterPrompt]:
    """Read prompts from a JSONL file with `prompt` and, where it is not the base that continues, `adapter`.

    Raises:
        ConfigError: there is no such file.
        ValueError: a line cannot be read or has something else in it, or there is none.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"prompts {file}: no such file.\n  Check --prompts.")
    example = '{"prompt": "The sea", "adapter": "poems"}'
    prompts = []
    for where, row in json_rows(file, example):
        unknown = [key for key in row if key not in ("prompt", "adapter")]
        if unknown:
            raise ValueError(
                f"{file}: {where} has {unknown[0]!r}{nearest(unknown[0], ('prompt', 'adapter'))}\n"
                f"  A line has a prompt and may have an adapter, such as {example}."
            )
        prompt, adapter = row.get("prompt"), row.get("adapter")
        if not isinstance(prompt, str) or not prompt or not isinstance(adapter, str | None):
            raise ValueError(
                f"{file}: {where} has prompt {prompt!r} and adapter {adapter!r}, expected a text and a name.\n"
                f"  Write such as {example}, without adapter for the base."
            )
        prompts.append(AdapterPrompt(prompt, adapter, f"{file}: {where}"))
    if not prompts:
        raise ValueError(f"{file} holds no prompt.\n  Write one object in each line, such as {example}.")
    return prompts


def find_adapters(directory: str | Path, prompts: Sequence[AdapterPrompt]) -> dict[str, Path]:
    """The folders of the adapters that prompts name, adapter or run directories in a directory.

    Raises:
        ConfigError: there is no such directory, or a name is not in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"adapters {directory}: no such directory.\n  Check --adapters.")
    known = {path.name: folder for path in sorted(directory.glob("*/")) if (folder := _adapter_in(path)) is not None}
    # peft's name for none
    known.pop("__base__", None)
    for prompt in prompts:
        if prompt.adapter is not None and prompt.adapter not in known:
            more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
            raise ConfigError(
                f"{prompt.where} names the adapter {prompt.adapter!r}, which is not in {directory}"
                f"{nearest(prompt.adapter, known)}\n"
                f"  Adapters there: {', '.join(list(known)[:_SHOWN]) or 'none'}{more}."
            )
    named = {prompt.adapter for prompt in prompts}
    return {name: folder for name, folder in known.items() if name in named}


def load_directory(folders: Mapping[str, Path], base: str | None = None) -> tuple[nn.Module, Any]:
    """Load a base model with adapters that go together in a batch.

    Args:
        folders: the folder of each, by name; none for the base alone.
        base: the base model; by default the one that the adapters name.

    Returns:
        (model, tokenizer)

    Raises:
        ConfigError, ValueError: the adapters are of several bases or methods, or of one that batches cannot mix, or as
            `load_model` and `load_folders`.
    """
    from ssmtune.models import load_model
    from ssmtune.stored_adapters import load_folders, read_adapter_config

    configs = {name: read_adapter_config(folder) for name, folder in folders.items()}
    base = _common_base(configs) if base is None else base
    _check_method(configs, folders)
    model, tokenizer = load_model(base)
    return (load_folders(model, folders) if folders else model), tokenizer


def _adapter_in(path: Path) -> Path | None:
    """The adapter that a directory is, or that a run directory holds."""
    return next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)


def _common_base(configs: Mapping[str, dict[str, Any]]) -> str:
    from ssmtune.models import portable_name

    bases: dict[str | None, str] = {}
    for name, config in configs.items():
        bases.setdefault(portable_name(config.get("base_model_name_or_path")), name)
    if not bases or None in bases:
        raise ConfigError(
            ("no prompt names an adapter" if not bases else f"{bases[None]!r} does not say which model it is for")
            + ", so the base model is not known.\n  Name it: ssmtune generate MODEL --adapters DIR --prompts FILE"
        )
    if len(bases) > 1:
        (base, name), (other, another) = list(bases.items())[:2]
        raise ValueError(
            f"{name!r} was trained for {base!r}, and {another!r} for {other!r}.\n"
            "  A batch has one base model. Generate with the adapters of each base apart."
        )
    return next(iter(bases))


def _check_method(configs: Mapping[str, dict[str, Any]], folders: Mapping[str, Path]) -> None:
    from ssmtune.tuners.several import adapter_folders

    methods: dict[str, str] = {}
    for name, config in configs.items():
        method = "LORA with DoRA" if config.get("use_dora") else config["peft_type"]
        if len(adapter_folders(folders[name])) > 1:
            method = "several methods at once"
        if method not in MIXED:
            raise ValueError(
                f"{name!r} is an adapter of {method}, which a batch of several adapters cannot have.\n"
                f"  Those of {', '.join(MIXED)} can.\n"
                f"  Generate with it alone: ssmtune generate {folders[name]} --prompt-file FILE"
            )
        methods.setdefault(method, name)
    if len(methods) > 1:
        (method, name), (other, another) = list(methods.items())[:2]
        raise ValueError(
            f"{name!r} is an adapter of {method}, and {another!r} of {other}.\n"
            "  A batch has adapters of one method. Generate with those of each method apart."
        )

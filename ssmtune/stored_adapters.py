"""Adapters in folders, and what runs have made: read, checked, and put on their base models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError, nearest
from ssmtune.config_files import load_config
from ssmtune.models import load_model, quiet_peft

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put a saved adapter on its base model, and those stored in folders inside its own, which were trained with it.

    Raises:
        ValueError: the directory does not hold a sound adapter, or it does not fit the model.
    """
    from ssmtune.tuners.several import adapter_folders

    read_adapter_config(directory)
    return load_folders(model, adapter_folders(directory))


def load_folders(model: nn.Module, folders: Mapping[str, Path]) -> nn.Module:
    """Put saved adapters on their base model, each under the name given; the first of each method is active.

    Raises:
        ValueError: a folder does not hold a sound adapter, or it does not fit the model.
    """
    from peft import get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from safetensors import safe_open

    from ssmtune.prompt_tuning import repair
    from ssmtune.tuners.mixer_tuner import MixerTunerModel
    from ssmtune.tuners.several import load_places

    configs = {name: read_adapter_config(folder) for name, folder in folders.items()}
    first = next(iter(folders))
    try:
        with quiet_peft():
            adapted = load_places(model, folders, use_safetensors=True)
    except RuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(
            f"the {configs[first]['peft_type']} adapter in {folders[first]} does not fit {type(model).__name__}: "
            f"{reason}\n"
            f"  It was trained for {configs[first].get('base_model_name_or_path')!r}. Load it on that model."
        ) from None
    for name, folder in folders.items():
        if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[configs[name]["peft_type"]], MixerTunerModel):
            # Checked as it was loaded, without going over the tensors of all the others.
            continue
        expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        with safe_open(folder / _WEIGHTS, "pt") as file:
            missing = expected.keys() - set(file.keys())
            broken = [key for key in file.keys() if not file.get_tensor(key).isfinite().all()]  # noqa: SIM118
        if missing:
            # peft would leave them as they were initialised, and only warn
            raise ValueError(
                f"{folder}/{_WEIGHTS} lacks {len(missing)} tensors, first {min(missing)}.\n"
                f"  It was trained for {configs[name].get('base_model_name_or_path')!r} or is incomplete. "
                "Load it on that model."
            )
        if broken:
            raise ValueError(
                f"{folder}/{_WEIGHTS} holds NaN or infinity in {len(broken)} tensors, first {broken[0]}.\n"
                "  Training diverged or the file is damaged. Use an earlier checkpoint, or train with a lower rate."
            )
    return repair(adapted).eval()


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """Read and check an adapter directory without loading it.

    Raises:
        ValueError: a file is missing or damaged, a pickle, or of a method that is not known here.
    """
    directory = Path(directory)
    config_file, weights = directory / "adapter_config.json", directory / _WEIGHTS
    if not config_file.is_file():
        raise ValueError(
            f"{directory} is not an adapter: it has no adapter_config.json.\n"
            "  Give a run directory of `ssmtune train`, or the directory that save_pretrained wrote."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{config_file} is damaged: it is not JSON with a peft_type.\n  Train again, or copy it again."
        ) from None
    from peft.utils import PeftType
    from safetensors import SafetensorError, safe_open

    import ssmtune.tuners  # noqa: F401

    known = [member.value for member in PeftType]
    if kind not in known:
        raise ValueError(
            f"{config_file}: unknown method {kind!r}{nearest(str(kind), known)}\n"
            "  It was written by another program or a newer version, or is a method of your own: --import its module."
        )
    if not weights.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise ValueError(
            f"{directory} has no {_WEIGHTS}"
            + (", only a pickle (adapter_model.bin), which can run code when it is read.\n" if pickled else ".\n")
            + "  Save the adapter again with a current version of peft."
        )
    try:
        with safe_open(weights, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{weights} cannot be read: {error}.\n"
            "  The file is damaged or was not written to its end. Train again, or copy it again."
        ) from None
    return config


def load_trained(name: str, *, base_only: bool = False, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """Load a model, or what a run made of one.

    Args:
        name: a run directory, an adapter directory, or whatever `load_model` takes.
        base_only: leave the adapter out, to compare with what was there before.

    Returns:
        (model, tokenizer)

    Raises:
        ConfigError, ValueError: as `load_model` and `load_adapter`, and for a run that is not finished.
    """
    place = Path(name).expanduser()
    if (place / "adapter_config.json").is_file():
        adapter = place
    elif (place / "adapter").is_dir():
        adapter = place / "adapter"
    elif (place / "model").is_dir():
        if not base_only:
            return load_model(str(place / "model"), dtype)
        return load_model(_base_of_run(place), dtype)
    elif (place / "config.yaml").is_file():
        raise ConfigError(
            f"{name} is a run without results: it was interrupted or has failed.\n"
            f"  Go on with it: ssmtune train --resume --out {name}"
        )
    else:
        return load_model(name, dtype)
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter} does not say which model it was trained for.\n"
            "  Write its name into adapter_config.json as base_model_name_or_path."
        )
    model, tokenizer = load_model(base, dtype)
    return (model if base_only else load_adapter(model, adapter)), tokenizer


def _base_of_run(place: Path) -> str:
    if not (place / "config.yaml").is_file():
        raise ConfigError(f"{place} has no config.yaml, which names the model it began with.\n  Give that model.")
    return load_config(place / "config.yaml").model

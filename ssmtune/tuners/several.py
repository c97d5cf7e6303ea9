"""Methods beside each other, loaded in one call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ssmtune.tuners.adapter_file import naming
from ssmtune.tuners.state_config import StateTunerConfig


def load_adapters(model: nn.Module, folder: str | Path, **kwargs: Any) -> PeftModel:
    """Load every adapter of a folder into a model, as `save_pretrained` of a model with several left them.

    `save_pretrained` stores the adapters of all methods of a model: the one named "default" in the folder itself, each
    other one in a subfolder of its name. The first of each method is active afterwards, in alphabetical order after
    "default"; further ones of a method are loaded beside it. Adapters of a transformers Mamba fit the same model in
    mamba_ssm, and the other way round.

    Args:
        model: the base model, changed in place.
        folder: a local folder.
        kwargs: passed on to `PeftModel.from_pretrained` and `load_adapter`, such as `is_trainable=True`.

    Returns:
        A `PeftModel` of the last method, around all of them.

    Raises:
        ValueError: the folder holds no adapter, or one cannot be loaded.

    Example:
        >>> get_peft_model(base, LoraConfig(target_modules=["in_proj"]), adapter_name="low")
        >>> model = get_peft_model(base, StateOffsetConfig(), adapter_name="shift")  # both train
        >>> model.save_pretrained("run")
        >>> model = ssmtune.load_adapters(base, "run")
    """
    places = adapter_folders(folder)
    if not places:
        raise ValueError(
            f"{folder} holds no adapter: neither it nor a folder in it has a {CONFIG_NAME}.\n"
            "  Pass the folder that save_pretrained wrote to."
        )
    return load_places(model, places, **kwargs)


def load_places(model: nn.Module, places: Mapping[str, Path], **kwargs: Any) -> PeftModel:
    """Load adapters into a model by the folders that they are in, under these names; see `load_adapters`.

    Those of a state method whose configs are alike are added all at once, frozen; peft loads one after the other.
    """
    wrappers: dict[str, PeftModel] = {}
    alike: dict[str, list[tuple[str, PeftConfig, Path]]] = {}
    for name, path in places.items():
        config = PeftConfig.from_pretrained(path)
        if not hasattr(model, "prepare_inputs_for_generation"):
            # A model of mamba_ssm: what peft has for tasks is for models of transformers.
            config.task_type = None
        method = config.peft_type
        if method not in wrappers:
            # As it was stored: peft fills in what was left out.
            alike[method] = [(name, copy(config), path)]
            with naming(name) if len(places) > 1 else nullcontext():
                wrappers[method] = PeftModel.from_pretrained(model, path, adapter_name=name, config=config, **kwargs)
        elif kwargs.keys() <= {"use_safetensors"} and _alike(config, alike[method][0][1], path):
            alike[method].append((name, config, path))
        else:
            with naming(name):
                wrappers[method].load_adapter(path, name, **kwargs)
    for method, ((first, *_), *others) in alike.items():
        stored = ((name, config, load_file(path / SAFETENSORS_WEIGHTS_NAME)) for name, config, path in others)
        if others:
            wrappers[method].base_model.add_stored(first, stored)
    return list(wrappers.values())[-1]


def _alike(config: PeftConfig, first: PeftConfig, path: Path) -> bool:
    """Whether an adapter has tensors of the same shapes as the first of its method, and nothing but these."""
    if not isinstance(config, StateTunerConfig) or config.modules_to_save:
        return False
    where_from = dict.fromkeys(("base_model_name_or_path", "revision", "inference_mode"))
    same = asdict(config) | where_from == asdict(first) | where_from
    return same and (path / SAFETENSORS_WEIGHTS_NAME).is_file()


def adapter_folders(folder: str | Path) -> dict[str, Path]:
    """The adapters of a folder by name: the one in it, and those in folders of it."""
    folder = Path(folder)
    # The checkpoints that a Trainer leaves beside the adapters are earlier states of the same ones.
    subfolders = [path for path in sorted(folder.glob("*/")) if not re.fullmatch(r"checkpoint-\d+", path.name)]
    places = {"default": folder} | {path.name: path for path in subfolders}
    return {name: path for name, path in places.items() if (path / CONFIG_NAME).is_file()}

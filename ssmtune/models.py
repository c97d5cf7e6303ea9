"""Models and adapters by name: those in the package, a local directory, or a name on the hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError, nearest
from ssmtune.hub import cache_alone_if_unreachable

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

# formats that can run code when they are read
_PICKLES = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "pytorch_model.pt")


def builtin_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def resolve_model(name: str) -> str:
    """The directory of a built-in or local model, or the name itself if it can only be on the hub.

    Raises:
        ConfigError: neither, or a local directory without a model in it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _check_model_directory(path)
        return str(path.resolve())
    if name in builtin_models():
        return str(CHECKPOINTS / name)
    if path.exists():
        raise ConfigError(f"model {name!r} is a file.\n  Give the directory that holds config.json and the weights.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = builtin_models()
        raise ConfigError(
            f"unknown model {name!r}{nearest(name, known)}\n"
            f"  Built in: {', '.join(known) or 'none'}. Else give a local directory, or a hub name such as "
            "state-spaces/mamba-130m-hf."
        )
    return name


def load_model(name: str, dtype: str | torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, with the mixers patched where ssmtune knows them.

    Args:
        name: a built-in name, a local directory, or a name on the hub.
        dtype: of the weights; None for float32, whatever the file holds.

    Returns:
        (model in evaluation mode, tokenizer with a padding token)

    Raises:
        ConfigError: no such model.
        ValueError: its files are missing, damaged, or pickles.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ssmtune.mixers import find_mixers, patch

    place = resolve_model(name)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"trust_remote_code": False}
    with _loading(name, place):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        config = AutoConfig.from_pretrained(place, **options)
        if getattr(config, "rescale_prenorm_residual", False):
            # meant for a new model, but transformers does it to weights that it has just read (docs/upstream.md)
            config.rescale_prenorm_residual = False
        model = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype or torch.float32, use_safetensors=True, **options
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if find_mixers(model):
        patch(model)
    return model.eval(), tokenizer


def empty_model(name: str) -> nn.Module:
    """The model that `load_model` would load, on the meta device and without its weights: what it is made of.

    Raises:
        ConfigError, ValueError: as `load_model`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = resolve_model(name)
    with _loading(name, place), torch.device("meta"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def _loading(name: str, place: str) -> Iterator[None]:
    """Read from a place without bars, and say in one way what went wrong."""
    try:
        with no_progress_bars(), nullcontext() if Path(place).is_dir() else cache_alone_if_unreachable():
            yield
    except Exception as error:  # noqa: BLE001 - transformers, tokenizers and safetensors raise unrelated kinds
        raise _load_error(name, place, error) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for each file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide what peft warns of without need: an attribute's old name in transformers, a second method on a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        for message in (
            "You are trying to modify a model with PEFT for a second time",
            "Already found a `peft_config`",
        ):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def portable_name(place: str | None) -> str | None:
    """The name of a model in the package by its path, which is another on every machine; any other place as it is."""
    path = Path(place or "")
    return path.name if path.parent == CHECKPOINTS else place


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
        with safe_open(folder / _ADAPTER_WEIGHTS, "pt") as file:
            missing = expected.keys() - set(file.keys())
            broken = [key for key in file.keys() if not file.get_tensor(key).isfinite().all()]  # noqa: SIM118
        if missing:
            # peft would leave them as they were initialised, and only warn
            raise ValueError(
                f"{folder}/{_ADAPTER_WEIGHTS} lacks {len(missing)} tensors, first {min(missing)}.\n"
                f"  It was trained for {configs[name].get('base_model_name_or_path')!r} or is incomplete. "
                "Load it on that model."
            )
        if broken:
            raise ValueError(
                f"{folder}/{_ADAPTER_WEIGHTS} holds NaN or infinity in {len(broken)} tensors, first {broken[0]}.\n"
                "  Training diverged or the file is damaged. Use an earlier checkpoint, or train with a lower rate."
            )
    return repair(adapted).eval()


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
    from ssmtune.config import load_config

    if not (place / "config.yaml").is_file():
        raise ConfigError(f"{place} has no config.yaml, which names the model it began with.\n  Give that model.")
    return load_config(place / "config.yaml").model


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """Read and check an adapter directory without loading it.

    Raises:
        ValueError: a file is missing or damaged, a pickle, or of a method that is not known here.
    """
    directory = Path(directory)
    config_file, weights = directory / "adapter_config.json", directory / _ADAPTER_WEIGHTS
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
            f"{directory} has no {_ADAPTER_WEIGHTS}"
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


def _check_model_directory(path: Path) -> None:
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} holds an adapter, not a model.\n"
            "  Give the model that it was trained for; `ssmtune generate` takes the adapter."
        )
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is not a model: it has no config.json.\n"
            "  Give the directory that save_pretrained wrote, with config.json, model.safetensors and a tokenizer."
        )
    if not list(path.glob("*.safetensors")):
        pickled = [name for name in _PICKLES if (path / name).is_file()]
        raise ConfigError(
            f"{path} has no weights in safetensors"
            + (f", only {pickled[0]}, a pickle, which can run code when it is read.\n" if pickled else ".\n")
            + "  Save it again with save_pretrained of a current transformers."
        )


def _load_error(name: str, place: str, error: Exception) -> ValueError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(error).__name__)[:200]
    if not Path(place).is_dir():  # a name on the hub
        known = builtin_models()
        return ConfigError(
            f"model {name!r} is neither built in nor a local directory, and could not be read from the hub.\n"
            f"  {reason}\n"
            f"  Check the name and the network. Built in: {', '.join(known) or 'none'}{nearest(name, known)}"
        )
    return ValueError(
        f"model {name!r} cannot be loaded from {place}.\n  {reason}\n"
        "  The files are damaged or incomplete, or of an unknown architecture. Save or copy the model again."
    )

"""Models by name: those in the package, a local directory, or a name on the hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError, nearest
from ssmtune.hub import cache_alone_if_unreachable
from ssmtune.reasons import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"

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
    reason = first_line(error)
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

"""The model card of a stored adapter: what it is and how to load it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ssmtune import __version__

if TYPE_CHECKING:
    from ssmtune.tuners.mixer_config import MixerTunerConfig

_BEGIN = "<!-- Written by ssmtune whenever the adapter is saved. Your own text below the end of it is kept. -->"
_END = "<!-- The end of what ssmtune writes. -->"
_TEMPLATE_OF_PEFT = "# Model Card for Model ID"

_LOAD = """\
```python
import ssmtune  # adds the method to peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/or/name-of-this-adapter")
```

Import `ssmtune` before loading this adapter: it adds the method to peft."""

_LOAD_ALL = """Each folder beside this file holds one adapter. They load together:

```python
import ssmtune
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = ssmtune.load_adapters(base, "path/to/this-folder")
```"""


def write_card(folder: Path, config: MixerTunerConfig) -> None:
    """Describe a stored adapter in the README.md beside it.

    The empty template that peft puts there is replaced, also the one beside the folders of several adapters. Other text
    is kept, and what was written by an earlier save is brought up to date. A folder with neither tensors nor a card is
    left alone: it holds a config only.

    Args:
        folder: where the adapter is stored.
        config: its config.
    """
    path, weights = folder / "README.md", folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() and not weights.is_file():
        return
    together = folder.parent / "README.md"
    if together.is_file() and not (folder.parent / CONFIG_NAME).is_file():
        if any(mark in together.read_text(encoding="utf-8") for mark in (_TEMPLATE_OF_PEFT, _BEGIN)):
            _put(together, config, _describe_all(config))
    _put(path, config, _describe(config, weights))


def _put(path: Path, config: MixerTunerConfig, text: str) -> None:
    """Put a text in place of the template or of what was put before, and what finds it into the header."""
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data, kept = card.data, card.text
    data["library_name"] = "peft"
    data["tags"] = sorted({*(data.get("tags") or []), "ssmtune", "state-space-model", *config.card_tags})
    if config.base_model_name_or_path:
        data["base_model"] = config.base_model_name_or_path
    if config.task_type == "CAUSAL_LM":
        data["pipeline_tag"] = "text-generation"
    if _BEGIN in kept and _END in kept:
        before, _, rest = kept.partition(_BEGIN)
        kept = before + rest.partition(_END)[2]
    elif _TEMPLATE_OF_PEFT in kept:
        kept = ""
    text = "\n\n".join(filter(None, (_BEGIN, text, _END, kept.strip())))
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _describe_all(config: MixerTunerConfig) -> str:
    base = config.base_model_name_or_path
    lines = [
        f"# Adapters{f' of {Path(base).name}' if base else ''}",
        _LOAD_ALL.format(base=base or "name-of-the-base-model"),
        _versions(),
    ]
    return "\n\n".join(lines)


def _describe(config: MixerTunerConfig, weights: Path) -> str:
    base = config.base_model_name_or_path
    rows = {"base model": f"`{base}`" if base else "not known", "method": config.title}
    rows |= config.card_settings()
    if weights.is_file():
        rows["trained parameters"] = _count(weights, f".{config.peft_type.value.lower()}_")
    parts = [
        f"# {config.title}{f' of {Path(base).name}' if base else ''}",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]),
        "## How to load it",
        _LOAD.format(base=base or "name-of-the-base-model"),
        "## The method",
        f"`{config.formula}`",
        config.source,
        _versions(),
    ]
    return "\n\n".join(parts)


def _versions() -> str:
    packages = {"PEFT": peft, "Transformers": transformers, "PyTorch": torch}
    lines = [f"- ssmtune {__version__}", *(f"- {name} {package.__version__}" for name, package in packages.items())]
    # The heading under which peft looks for its own version.
    return "\n".join(["### Framework versions", "", *lines])


def _count(weights: Path, prefix: str) -> str:
    with safe_open(weights, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if prefix in key}  # noqa: SIM118
    mixers = {key.partition(prefix)[0] for key in shapes}
    return f"{sum(map(prod, shapes.values())):,} in {len(mixers)} mixer{'' if len(mixers) == 1 else 's'}"

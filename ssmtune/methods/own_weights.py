"""Training the model's own weights: every one, or some of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.config import ConfigError
from ssmtune.methods.method import Method
from ssmtune.methods.needs import parameters

if TYPE_CHECKING:
    from torch import nn

# Mamba-2 and Zamba hold some as parameters of the mixer itself: dt_bias, x_proj_weight.
BIASES = r"(^|[._])bias$"
NORMS = r"(norm\w*|\.ln_\w+)\.(weight|bias)$"
S6 = r"\.(conv1d|x_proj|dt_proj)[._](weight|bias)$|\.(A_log|D|dt_bias)$"
LAST_LAYERS = 2


def train_all(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train every weight."""
    return model.requires_grad_(True)


def train_subset(model: nn.Module, options: Mapping[str, Any], parameters: str) -> nn.Module:
    """Train the parameters whose names a regular expression is found in."""
    from peft import get_peft_model

    from ssmtune.tuners import WeightSubsetConfig

    return get_peft_model(model, WeightSubsetConfig(task_type="CAUSAL_LM", parameters=[parameters]))


def train_last_layers(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train the last layers, without the norm and the head after them."""
    from torch import nn

    count, layers = options.get("last_layers", LAST_LAYERS), model.config.num_hidden_layers
    if count > layers:
        raise ConfigError(f"last_layers is {count}, but {type(model).__name__} has {layers}.\n  Give a smaller number.")
    name = next(name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers)
    indices = "|".join(map(str, range(layers - count, layers)))
    return train_subset(model, options, rf"^{re.escape(name)}\.({indices})\.")


def train_embeddings(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Train the embeddings and the head, which are one matrix where the model ties them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name.replace(".", r"\.") for name, module in model.named_modules() if any(module is end for end in ends)]
    return train_subset(model, options, rf"^({'|'.join(names)})\.")


OWN_WEIGHT_METHODS = (
    Method("full", "Full fine-tuning", 4e-4, "full", train_all),
    Method(
        "bitfit", "BitFit", 2e-3, "weights", partial(train_subset, parameters=BIASES),
        needs=parameters(BIASES, "bias"),
    ),
    Method(
        "layer-norm", "LayerNorm tuning", 2e-3, "weights", partial(train_subset, parameters=NORMS),
        needs=parameters(NORMS, "norm with weights"),
    ),
    Method(
        "s6", "S6 only", 5e-4, "weights", partial(train_subset, parameters=S6),
        needs=parameters(S6, "convolution, time step, A or D of a recurrence"),
    ),
    Method("last-layers", "Last layers only", 4e-4, "weights", train_last_layers, ("last_layers",)),
    Method("embeddings", "Embeddings and head only", 4e-4, "weights", train_embeddings),
)  # fmt: skip

"""LoRA and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.methods.method import Method
from ssmtune.methods.needs import modules

if TYPE_CHECKING:
    from torch import nn

# The projections of a mixer in which LoRA trains: a patched mixer calls each of them as a module.
# out_proj is left out because peft refuses it on Mamba. A model without any gets LoRA in every linear layer but its
# head, as in Dettmers et al., QLoRA, 2023: of GPT-NeoX query_key_value, dense, dense_h_to_4h and
# dense_4h_to_h, of Llama q, k, v, o, gate, up and down_proj.
LORA_TARGETS = (
    *("in_proj", "x_proj", "dt_proj"),
    # Of Gated DeltaNet, where they come together (Qwen3-Next) or apart (Qwen3.5).
    *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
# Those among them that make what the recurrence reads: B, C and the time step.
S6_TARGETS = ("x_proj", "dt_proj")
LORA_RANK = 8


def lora_targets(model: nn.Module, targets: Sequence[str] = LORA_TARGETS) -> list[str] | str:
    """The modules that LoRA adapts unless told otherwise, as peft's `target_modules`."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in targets if name in present] or "all-linear"


def add_lora(
    model: nn.Module,
    options: Mapping[str, Any],
    targets: Sequence[str] = LORA_TARGETS,
    adapter_name: str = "default",
    **settings: Any,
) -> nn.Module:
    """Put LoRA on the projections of a model; `settings` go to peft's LoraConfig."""
    from peft import LoraConfig, get_peft_model

    rank = options.get("rank", LORA_RANK)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=options.get("alpha", rank),
        lora_dropout=options.get("dropout", 0.0),
        target_modules=options.get("target_modules") or lora_targets(model, targets),
        layers_to_transform=options.get("layers"),
        **settings,
    )
    return get_peft_model(model, config, adapter_name=adapter_name)


_OPTIONS = ("rank", "alpha", "dropout", "target_modules", "layers")

LOW_RANK_METHODS = (
    Method("lora", "LoRA", 2e-3, "weights", add_lora, _OPTIONS),
    Method(
        "lora-s6", "LoRA on the S6 projections", 2e-3, "weights", partial(add_lora, targets=S6_TARGETS),
        ("rank", "alpha", "dropout", "layers"), modules(*S6_TARGETS),
    ),
    Method("dora", "DoRA", 2e-3, "weights", partial(add_lora, use_dora=True), _OPTIONS),
)  # fmt: skip

"""The base models of the comparison: one size, one tokenizer, four architectures.

Each has within 3 % of the parameters of the first. What is usual for an architecture stays: the width of a GPT-NeoX
block's MLP is four times its own, a Llama block's gated MLP has about as many weights, Mamba doubles its width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Mamba2Config, MambaConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

VOCAB_SIZE = 8192
SEED = 0
# end-of-text is the one special token: it begins, ends and pads
TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TRANSFORMER = {
    "hidden_size": 224,
    "num_hidden_layers": 6,
    "num_attention_heads": 7,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def mamba() -> PreTrainedConfig:
    return MambaConfig(hidden_size=256, num_hidden_layers=8, state_size=16, rescale_prenorm_residual=True, **TOKENS)


def mamba2() -> PreTrainedConfig:
    return Mamba2Config(
        hidden_size=256,
        num_hidden_layers=8,
        state_size=64,
        num_heads=8,
        head_dim=64,
        n_groups=1,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        **TOKENS,
    )


def gpt_neox() -> PreTrainedConfig:
    return GPTNeoXConfig(intermediate_size=896, **TRANSFORMER, **TOKENS)


def llama() -> PreTrainedConfig:
    return LlamaConfig(intermediate_size=624, **TRANSFORMER, **TOKENS)


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "gpt-neox": gpt_neox,
    "llama": llama,
}


def build_model(architecture: str) -> PreTrainedModel:
    """An untrained model, the same each time."""
    torch.manual_seed(SEED)
    # attention written out: a fifth faster, at 512 tokens on a CPU, than torch's fused one
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), attn_implementation="eager")


def describe(config: PreTrainedConfig) -> str:
    """Its shape in words, for a model card."""
    words = [f"{config.num_hidden_layers} layers", f"width {config.hidden_size}"]
    if hasattr(config, "state_size"):
        words.append(f"state size {config.state_size}")
    if hasattr(config, "intermediate_size") and hasattr(config, "num_attention_heads"):
        words += [f"{config.num_attention_heads} heads", f"MLP of {config.intermediate_size}"]
    return ", ".join([*words, "tied embeddings"])

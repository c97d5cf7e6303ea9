import copy
import math

import pytest
import torch
import transformers
from torch import nn
from transformers import MambaForCausalLM, PreTrainedModel

from ssmtune.mixers import StateAdapter, StateInputs, find_mixers, patch, state_shape

EVERY = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
PURE = {"state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
HYBRID = {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
HEADS = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
ATTENTION = {"num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
DELTA_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA_EXPERTS |= {"shared_expert_intermediate_size": 24}
KIMI = {
    "layer_types": DELTA["layer_types"],
    "mlp_layer_types": ["dense"] * 3,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES = {
    "mamba": ("Mamba", PURE),
    "falcon_mamba": ("FalconMamba", PURE),
    # A mixer with a dense layer, one with experts, attention.
    "jamba": ("Jamba", HYBRID | EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 2}),
    # The attention is shared, so there have to be two layers of it.
    "zamba": ("Zamba", HYBRID | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
    "mamba2": ("Mamba2", HEADS | {"num_hidden_layers": 2}),
    "zamba2": (
        "Zamba2",
        ATTENTION
        | {"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 2, "chunk_size": 4, "adapter_rank": 4}
        | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    ),
    "bamba": ("Bamba", ATTENTION | MAMBA_HEADS | {"attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronH",
        ATTENTION
        | {
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "head_dim": 8,
        }
        | {"layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]},
    ),
    "falcon_h1": ("FalconH1", ATTENTION | MAMBA_HEADS | {"mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        ATTENTION
        | MAMBA_HEADS
        | {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "shared_intermediate_size": 48}
        | {"num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "qwen3_next": ("Qwen3Next", DELTA | DELTA_EXPERTS | {"head_dim": 8}),
    "qwen3_5": ("Qwen3_5", DELTA | {"head_dim": 8}),
    "qwen3_5_moe": ("Qwen3_5Moe", DELTA | DELTA_EXPERTS | {"head_dim": 8}),
    "qwen4_exp": (
        "Qwen4Exp",
        DELTA
        | DELTA_EXPERTS
        | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "head_dim": 8}
        | {"hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 16, "indexer_compress_ratio": 4},
    ),
    "olmo_hybrid": ("OlmoHybrid", DELTA),
    "kimi_linear": ("KimiLinear", KIMI | {"linear_num_heads": 4, "linear_head_dim": 8}),
    "bailing_hybrid": ("BailingHybrid", KIMI | {"head_dim": 8, "num_mtp_layers": 0}),
}


def randomise(model: nn.Module) -> None:
    """Make every parameter, biases and norms too, different from channel to channel and large enough to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn.dt_bias", "attn.A_log", "forget_gate.dt_bias", "forget_gate.A_log")):
                # Those that models of the delta rule start with forget nearly everything at each step.
                parameter.copy_(0.3 * torch.randn_like(parameter) - 1)
            elif name.endswith(
                ("_proj.bias", "proj_bias", "dt_bias", "conv1d.bias", ".D", "A_log", "layernorm.weight")
            ):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith(("embeddings.weight", "embed_tokens.weight")):
                parameter.copy_(torch.randn_like(parameter) / 2)
            elif name.endswith(("_proj.weight", "_proj_weight")):
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)


@pytest.fixture
def make_family():
    """A factory of random models, by the name of the family in `FAMILIES`."""

    def make(family: str, **changes) -> PreTrainedModel:
        name, config = FAMILIES[family]
        model_class = getattr(transformers, f"{name}ForCausalLM")
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**(EVERY | config | changes)))
        randomise(model)
        return model.eval()

    return make


@pytest.fixture
def make_mamba(make_family):
    """A factory of random Mamba models."""

    def make(**changes) -> MambaForCausalLM:
        return make_family("mamba", **changes)

    return make


@pytest.fixture
def make_pair(make_family):
    """A factory of two equal models, transformers' own and a patched one."""

    def make(family: str = "mamba", **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
        ours = make_family(family, **changes)
        theirs = copy.deepcopy(ours)
        patch(ours)
        return theirs, ours

    return make


class Additions(StateAdapter):
    """The simplest adapter: whichever of the four inputs it is made with, as parameters."""

    def __init__(self, **tensors):
        super().__init__()
        self.tensors = nn.ParameterDict(tensors)
        self.enabled = True

    def state_inputs(self) -> StateInputs:
        return StateInputs(**self.tensors) if self.enabled else StateInputs()


@pytest.fixture
def adapt():
    """A function that gives every mixer a random adapter with the inputs asked for."""

    def adapt(model, *kinds: str, name: str = "additions") -> list[Additions]:
        adapters = []
        for index, (_, mixer) in enumerate(find_mixers(model)):
            generator = torch.Generator().manual_seed(index)
            *channels, dstate = state_shape(mixer)
            dim = math.prod(channels)
            shapes = {"initial_state": (dim, dstate), "state_offset": (dim, dstate), "output_offset": (dim,)}
            shapes["conv_state"] = (mixer.conv1d.weight.shape[0], mixer.conv_kernel_size - 1)
            adapter = Additions(**{kind: torch.randn(shapes[kind], generator=generator) for kind in kinds})
            mixer.add_module(name, adapter)
            adapters.append(adapter)
        return adapters

    return adapt


@pytest.fixture
def tokens():
    """A function that draws random tokens (batch, seqlen), none of them the pad."""

    def draw(batch: int, seqlen: int) -> torch.Tensor:
        return torch.randint(3, 64, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))

    return draw

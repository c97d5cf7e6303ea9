"""Models of state-spaces' mamba_ssm as those of transformers, and back: the same weights under other names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.reasons import reading_files_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_CONFIG, _WEIGHTS = "config.json", "pytorch_model.bin"
_SIZES = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
_FIELDS = {
    "Mamba1": _SIZES | {"dt_rank": "time_step_rank"},
    "Mamba2": _SIZES
    | {"headdim": "head_dim", "ngroups": "n_groups", "chunk_size": "chunk_size", "dt_limit": "time_step_limit"},
}
"""The entries of `ssm_cfg` by layer, and the names that transformers has for them."""
_INITIAL = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"),
    *("use_fast_path", "use_mem_eff_path"),
}
"""Entries of `ssm_cfg` that do not change what a trained model computes."""
_FIXED = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
"""Entries of `ssm_cfg` of which transformers has one value only."""
_EPSILON = 1e-5


def from_mamba_ssm(source: nn.Module | str | Path) -> PreTrainedModel:
    """Make the transformers model of a mamba_ssm checkpoint; mamba_ssm need not be installed.

    Args:
        source: the folder of a checkpoint (config.json and pytorch_model.bin, as `MambaLMHeadModel.save_pretrained`
            writes them and state-spaces publishes them), or a `MambaLMHeadModel`, with which the weights are shared.

    Returns:
        A `MambaForCausalLM` or `Mamba2ForCausalLM` in evaluation mode, with weights of the types that they have there.

    Raises:
        ValueError: the folder is no such checkpoint, or the model has what transformers has no place for.

    Example:
        >>> model = ssmtune.from_mamba_ssm("mamba2-130m")
        >>> model.save_pretrained("mamba2-130m-hf")
    """
    import torch
    import transformers

    if isinstance(source, (str, Path)):
        config, weights = _read(Path(source))
    else:
        config, weights = vars(source.config), source.state_dict()
    name, fields = _to_transformers(config)
    weights = {key.replace("backbone.embedding.", "backbone.embeddings."): tensor for key, tensor in weights.items()}
    embeddings = weights.get("backbone.embeddings.weight")
    # Padded to a round number, unlike the size that the config names.
    fields["vocab_size"] = 0 if embeddings is None else len(embeddings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of a model of mamba_ssm are not what its config says: {str(error).splitlines()[1].strip()}\n"
            "  The checkpoint is incomplete, or its files are of two models. Copy or save it again."
        ) from None
    model.tie_weights()
    return model.eval()


def to_mamba_ssm(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a transformers model as a checkpoint that `MambaLMHeadModel.from_pretrained` of mamba_ssm reads.

    Args:
        model: a `MambaForCausalLM` or `Mamba2ForCausalLM`, patched or not, without adapters.
        folder: where config.json and pytorch_model.bin are written; made if need be.

    Raises:
        ValueError: it is another model, has adapters, or what mamba_ssm has no place for.
    """
    import torch

    config = _to_mamba_ssm(model)
    weights = {key.replace("backbone.embeddings.", "backbone.embedding."): t for key, t in model.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    needs = f"{_CONFIG} and {_WEIGHTS}, with tensors and nothing else in that"
    remedy = "Save it again by MambaLMHeadModel.save_pretrained, or pass the model itself."
    with reading_files_of("a checkpoint of mamba_ssm", folder, needs, remedy):
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        return config, torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)


def _to_transformers(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name that transformers has for a kind of model, and the fields of its config."""
    settings = dict(config.get("ssm_cfg") or {})
    layer = settings.pop("layer", "Mamba1")
    names = _FIELDS.get(layer, {})
    known = names.keys() | _INITIAL
    odd = [f"{key}={value!r}" for key, value in settings.items() if key not in known and _FIXED.get(key, ...) != value]
    differences = {
        f"no d_model in its {_CONFIG}": "d_model" not in config,
        f"layers of the kind {layer!r}": not names,
        "attention layers": bool(config.get("attn_layer_idx")),
        "MLPs between the mixers": bool(config.get("d_intermediate")),
        "LayerNorm": not config.get("rms_norm", True),
        ", ".join(odd): bool(names and odd),
    }
    _refuse("a model of mamba_ssm", differences)
    fields = {new: settings[old] for old, new in names.items() if old in settings}
    fields |= {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        # Those of the tokenizer of all that state-spaces publishes.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if layer == "Mamba1":
        return "Mamba", fields
    heads = settings.get("expand", 2) * config["d_model"] // settings.get("headdim", 64)
    return "Mamba2", {"n_groups": 1} | fields | {"num_heads": heads}


def _to_mamba_ssm(model: PreTrainedModel) -> dict[str, Any]:
    """The config that mamba_ssm has for a model of transformers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = {"MambaForCausalLM": "Mamba1", "Mamba2ForCausalLM": "Mamba2"}.get(type(model).__name__)
    _refuse(f"a {type(model).__name__}", {"another architecture": layer is None})
    config = model.config
    differences = {
        "adapters, which have to be unloaded first": any(isinstance(part, BaseTunerLayer) for part in model.modules()),
        f"layer_norm_epsilon={config.layer_norm_epsilon}": config.layer_norm_epsilon != _EPSILON,
        f"hidden_act={config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
    }
    _refuse(f"a {type(model).__name__}", differences)
    settings = {old: getattr(config, new) for old, new in _FIELDS[layer].items()}
    if settings.get("dt_limit") is not None and tuple(settings["dt_limit"]) == (0.0, math.inf):
        # JSON has no infinity.
        del settings["dt_limit"]
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer} | settings,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _refuse(what: str, differences: dict[str, bool]) -> None:
    """Raise a ValueError with the differences there are, of those that stand in the way."""
    if found := [text for text, there in differences.items() if there]:
        raise ValueError(
            f"cannot convert {what}: it has {'; '.join(found)}.\n"
            "  mamba_ssm and transformers share models of Mamba or Mamba-2 layers with RMS norms.\n"
            "  Use it as it is: ssmtune.patch and the state methods take the mixers of both."
        )

"""Sequences packed one after the other: how a patched model tells its mixers where each one starts.

transformers hands `position_ids` and their like to attention layers only, never to the mixers of a Mamba. What does
reach them is `attention_mask`, as it is, layer by layer. So a hook of the model, run before its forward pass, puts the
boundaries there: cu_seqlens, which a mixer knows from a mask by its single dimension. The model of Mamba-2 lets no such
mask through, but hands keywords on to its layers. As an argument of the layers they are at hand when gradient
checkpointing runs one again, whatever the model did in between.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .positions import continue_positions
from .selective_mixer import SelectiveMixer

# A handle that is pickled with the model keeps the number of the hook from being given away again.
_HANDLE = "_packing_hook"


def install_packing(model: nn.Module) -> None:
    """Give the transformers models in a module the hook; those that have it keep it."""
    for module in _models(model):
        if not hasattr(module, _HANDLE):
            handle = module.register_forward_pre_hook(hand_down_sequences, with_kwargs=True)
            setattr(module, _HANDLE, handle)


def remove_packing(model: nn.Module) -> None:
    """Take the hook from every module that has no patched mixer left."""
    for module in model.modules():
        if hasattr(module, _HANDLE) and not any(isinstance(part, SelectiveMixer) for part in module.modules()):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)


def hand_down_sequences(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Put the boundaries of packed sequences where the mixers of a model find them.

    Sequences are packed where `cu_seq_lens_q` or `seq_idx` says so, or where `position_ids` start again in a call
    with neither an attention mask nor a cache, which is what transformers goes by for attention. The model then runs
    without a cache: there is no single sequence to continue.

    Args:
        model: a transformers model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The arguments to go on with, or None to leave them as they are.

    Raises:
        ValueError: boundaries together with an attention mask or a cache, a mixer that is not patched, or attention
            that cannot be kept within a sequence.
    """
    if len(args) > 1:
        kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        args = ()
    if _is_handed_down(kwargs.get("attention_mask")):
        return args, _with_boundaries(model, kwargs, kwargs["attention_mask"])
    hybrid = any(kind != "linear_attention" for kind in getattr(model.config, "layer_types", None) or ())
    if (hybrid and model.base_model is not model) or model.config.get_text_config() is not model.config:
        # The model inside, beside one for images it may be, gets the same keywords and builds the masks.
        return None
    input_ids = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    told = next((name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None), None)
    occupied = ("attention_mask", "cache_params", "past_key_values")
    other = next((name for name in occupied if kwargs.get(name) is not None), None)
    if told is not None and other is not None:
        raise ValueError(
            f"{type(model).__name__} got {told}, which packs sequences, together with {other}.\n"
            "  A packed batch has no pads and continues nothing. Leave one of the two out."
        )
    if inputs is None:
        return None
    if other is not None:
        return continue_positions(model, args, kwargs, inputs)
    cu_seqlens = find_sequences(kwargs, inputs.shape[0], inputs.shape[1])
    if cu_seqlens is None:
        return None
    check_patched(model, "packed sequences", "run them as one sequence")
    if "indexed_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ValueError(
            f"{type(model).__name__} got packed sequences, but its attention chooses among all tokens of a row.\n"
            "  Give each sequence a row of its own, with pads."
        )

    kwargs = {**kwargs, "use_cache": False}
    if not hybrid:
        return args, _with_boundaries(model, kwargs, cu_seqlens)
    if told is not None:
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        positions = torch.arange(starts.shape[0], device=starts.device) - starts
        kwargs["position_ids"] = positions.view(inputs.shape[:2])
    if input_ids is not None:
        kwargs |= {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(input_ids)}
    return (), {**kwargs, "attention_mask": _masks(model, kwargs, cu_seqlens)}


def find_sequences(kwargs: dict[str, Any], batch: int, seqlen: int) -> Tensor | None:
    """Where packed sequences start, from the keywords of a model.

    Args:
        kwargs: may hold cu_seq_lens_q (n_sequences + 1,), seq_idx (batch, seqlen), which numbers the sequences, or
            position_ids (batch or 1, seqlen), which go up by one within a sequence.
        batch: the rows; each starts a sequence.
        seqlen: the tokens of a row.

    Returns:
        cu_seqlens (n_sequences + 1,) over the rows one after the other, or None if every row is one sequence.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"].to(torch.int32)
    numbers, positions = kwargs.get("seq_idx"), kwargs.get("position_ids")
    if numbers is not None:
        inside = numbers[:, 1:] == numbers[:, :-1]
    elif positions is not None and positions.dim() == 2:
        inside = positions[:, 1:] == positions[:, :-1] + 1
    else:
        return None
    if inside.all():
        return None
    starts = torch.nn.functional.pad(~inside.expand(batch, -1), (1, 0), value=True)
    bounds = starts.flatten().nonzero().flatten().to(torch.int32)
    return torch.nn.functional.pad(bounds, (0, 1), value=batch * seqlen)


def _models(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(isinstance(part, SelectiveMixer) for part in module.modules())
    ]


def _is_handed_down(attention_mask: Any) -> bool:
    mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    return isinstance(mask, Tensor) and mask.dim() == 1


def _with_boundaries(model: nn.Module, kwargs: dict[str, Any], boundaries: Tensor | dict) -> dict[str, Any]:
    """The keywords of a model, with the boundaries, or masks that have them, in the place of its mask."""
    kwargs = {**kwargs, "attention_mask": boundaries}
    if model.config.model_type == "mamba2" and model.base_model is model:
        kwargs["cu_seqlens"] = boundaries
    return kwargs


def check_patched(model: nn.Module, given: str, otherwise: str) -> None:
    """Refuse what a model is given if one of its mixers is transformers' own, which would do something else with it.

    Raises:
        ValueError: with the name of that mixer.
    """
    for name, module in model.named_modules():
        # A mixer has both, what is inside of it may have one.
        recurrent = hasattr(module, "conv1d") and hasattr(module, "layer_idx")
        if recurrent and not isinstance(module, SelectiveMixer):
            raise ValueError(
                f"{type(model).__name__} got {given}, but {name} is not patched.\n"
                f"  The mixer of transformers would {otherwise}. Patch all of the model with ssmtune.patch(model)."
            )


def _masks(model: nn.Module, kwargs: dict[str, Any], cu_seqlens: Tensor) -> dict[str, Tensor | None]:
    """The masks that a model with attention makes of its arguments, but for the one of its mixers."""
    from transformers.masking_utils import create_causal_mask

    causal_mask = create_causal_mask(
        config=model.config,
        inputs_embeds=kwargs["inputs_embeds"],
        attention_mask=None,
        past_key_values=None,
        position_ids=kwargs["position_ids"],
    )
    return {"full_attention": causal_mask, "linear_attention": cu_seqlens}

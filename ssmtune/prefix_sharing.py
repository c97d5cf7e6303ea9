"""One prompt for many continuations: its tokens are run once, forward and backward, whatever follows them.

The prompt is run, and the cache that it leaves is forked: recurrent states, windows of convolutions, keys and values.
A transformer under gradient checkpointing, which drops caches, runs one row instead: the prompt and its continuations
side by side, under a mask by which a continuation sees the prompt and itself. Both are differentiable, so that the
prompt gets the gradients of all its continuations in one backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune.data import IGNORED
from ssmtune.likelihood import innermost, logits_at, token_losses
from ssmtune.mixers import find_mixers
from ssmtune.mixers.continuation import check_continues, drops_caches, fork_cache
from ssmtune.prompt_tuning import VirtualTokenModel, cache_name


def shared_prefix_logits(
    model: nn.Module, prompt_ids: Tensor, continuation_ids: Tensor, prompt_mask: Tensor | None = None
) -> Tensor:
    """Logits of several continuations of each prompt, at the cost of one prompt.

    The same, gradients included, as those of every prompt repeated in front of each of its continuations. Dropout draws
    once for a prompt.

    Args:
        model: a causal language model, with or without adapters of peft; its mixers patched by `ssmtune.patch`.
        prompt_ids: (batch, prompt), padded on the left.
        continuation_ids: (batch, n, length), padded on the right with any token.
        prompt_mask: (batch, prompt), zero at pads; None where there are none.

    Returns:
        (batch, n, length, vocabulary): what predicts each token of a continuation. The first are the same for all
        continuations of a prompt.

    Raises:
        ValueError: a prompt does not end with a token, or the model cannot share one: its mixers are not patched, it
            runs under gradient checkpointing with mixers, or with attention that takes no mask of its own.

    Source: Wang and Hegde, Accelerating Direct Preference Optimization with Prefix Sharing, 2024, for the mask.
    """
    if prompt_mask is not None and bool(prompt_mask.all()):
        prompt_mask = None
    _check_prompts(prompt_ids, continuation_ids, prompt_mask)
    # What predicts a token is computed at the one before it.
    inputs = continuation_ids[..., :-1]
    virtual = _has_virtual_tokens(model)
    if virtual and not isinstance(model, VirtualTokenModel):
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} of peft puts its virtual tokens before each part of a text.\n"
            "  They would come between a prompt and its continuations. Call ssmtune.prompt_tuning.repair(model)."
        )
    side_by_side = drops_caches(model) and not virtual and not find_mixers(model)
    return (_side_by_side if side_by_side else _forked)(model, prompt_ids, inputs, prompt_mask)


def continuation_log_likelihoods(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The natural-log probability of each continuation after its prompt, summed over its tokens.

    Args:
        model: as of `shared_prefix_logits`.
        batch: prompt_ids and prompt_mask (batch, prompt), continuation_ids and continuation_mask (batch, n, length).

    Returns:
        (batch, n) float32.
    """
    logits = shared_prefix_logits(model, batch["prompt_ids"], batch["continuation_ids"], batch["prompt_mask"])
    targets = batch["continuation_ids"].masked_fill(batch["continuation_mask"] == 0, IGNORED)
    return -token_losses(logits, targets).sum(-1)


def _forked(model: nn.Module, prompt_ids: Tensor, inputs: Tensor, prompt_mask: Tensor | None) -> Tensor:
    """Run the prompts, then their continuations, each from a copy of what its prompt left in the cache."""
    check_continues(model, "prompts to share")
    batch, n, length = inputs.shape
    base = innermost(model)
    name, known = cache_name(base), inspect.signature(base.forward).parameters

    def call(input_ids: Tensor, mask: Tensor | None, positions: Tensor, **options: Any):
        if "position_ids" in known:
            options["position_ids"] = positions
        return model(input_ids=input_ids, attention_mask=mask, use_cache=True, **options)

    positions = _positions(prompt_ids, prompt_mask)
    output = call(prompt_ids, prompt_mask, positions, **({"logits_to_keep": 1} if "logits_to_keep" in known else {}))
    first = output.logits[:, None, -1:].expand(-1, n, -1, -1)
    if length == 0:
        return first
    mask = prompt_mask
    if mask is not None:
        mask = F.pad(mask.repeat_interleave(n, dim=0), (0, length), value=1)
    positions = _positions_after(positions, length).repeat_interleave(n, dim=0)
    rest = call(inputs.flatten(0, 1), mask, positions, **{name: fork_cache(output[name], n)}).logits
    return torch.cat([first, rest.unflatten(0, (batch, n))], dim=2)


def _side_by_side(model: nn.Module, prompt_ids: Tensor, inputs: Tensor, prompt_mask: Tensor | None) -> Tensor:
    """Run each prompt and its continuations in one row, in which no continuation sees another."""
    batch, n, length = inputs.shape
    prompt = prompt_ids.shape[1]
    _check_takes_mask(model, prompt + length)
    positions = _positions(prompt_ids, prompt_mask)
    after = _positions_after(positions, length).repeat(1, n)
    # Right before each continuation the prompt ends, and then each of its tokens predicts the next.
    ends = torch.full((n, 1), prompt - 1)
    places = torch.cat([ends, prompt + torch.arange(n * length).view(n, length)], dim=1).to(prompt_ids.device)
    logits = logits_at(
        model,
        places.flatten(),
        input_ids=torch.cat([prompt_ids, inputs.flatten(1)], dim=1),
        attention_mask=_block_mask(prompt_ids, prompt_mask, n, length, innermost(model).dtype),
        position_ids=torch.cat([positions, after], dim=1),
        use_cache=False,
    )
    return logits.unflatten(1, places.shape)


def _block_mask(prompt_ids: Tensor, prompt_mask: Tensor | None, n: int, length: int, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, (batch or 1, 1, row, row): zero where a token sees another."""
    device, prompt = prompt_ids.device, prompt_ids.shape[1]
    part = torch.cat([torch.zeros(prompt), torch.arange(1, n + 1).repeat_interleave(length)]).to(device)
    own = (part == 0) | (part[:, None] == part)
    sees = (own & torch.ones_like(own).tril())[None, None]
    if prompt_mask is not None:
        real = F.pad(prompt_mask.bool(), (0, n * length), value=True)
        # A pad, which no other token sees, sees itself: a softmax over nothing would be NaN.
        sees = sees & real[:, None, None] | torch.eye(len(part), dtype=torch.bool, device=device)
    return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)


def _positions(prompt_ids: Tensor, prompt_mask: Tensor | None) -> Tensor:
    """Positions (batch, prompt) that leave pads out."""
    mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask.long()
    return (mask.cumsum(1) - 1).clamp_min(0)


def _positions_after(positions: Tensor, length: int) -> Tensor:
    return positions[:, -1:] + torch.arange(1, length + 1, device=positions.device)


def _check_prompts(prompt_ids: Tensor, continuation_ids: Tensor, prompt_mask: Tensor | None) -> None:
    if prompt_ids.dim() != 2 or continuation_ids.dim() != 3 or len(prompt_ids) != len(continuation_ids):
        raise ValueError(
            f"prompt_ids has shape {tuple(prompt_ids.shape)} and continuation_ids {tuple(continuation_ids.shape)}, "
            "expected (batch, prompt) and (batch, n, length).\n"
            "  Every prompt has its own n continuations. Pad prompts on the left and continuations on the right."
        )
    if prompt_ids.shape[1] == 0 or continuation_ids.shape[2] == 0 or not _end_with_tokens(prompt_ids, prompt_mask):
        raise ValueError(
            "a prompt or a continuation is empty, or a prompt ends with a pad.\n"
            "  The first token of a continuation is predicted by the last of its prompt. Pad prompts on the left, and "
            "begin an empty one with the token that begins texts."
        )


def _end_with_tokens(prompt_ids: Tensor, prompt_mask: Tensor | None) -> bool:
    return prompt_mask is None or (prompt_mask.shape == prompt_ids.shape and bool(prompt_mask[:, -1].all()))


def _check_takes_mask(model: nn.Module, length: int) -> None:
    base = innermost(model)
    config = base.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    reason = None
    if config._attn_implementation not in ("sdpa", "eager"):
        reason = f"its attention is {config._attn_implementation}, which takes no mask of its own"
    elif set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        reason = f"it has layers of the kinds {', '.join(sorted(set(config.layer_types)))}"
    elif window is not None and window < length:
        reason = f"it sees {window} tokens back, fewer than the {length} of a prompt and a continuation"
    elif "position_ids" not in inspect.signature(base.forward).parameters:
        reason = "it takes no positions"
    if reason is not None:
        raise ValueError(
            f"{type(base).__name__} cannot share a prompt: {reason}.\n"
            "  Load it with attn_implementation='sdpa' if it is that, or repeat the prompt for each continuation."
        )


def _has_virtual_tokens(model: nn.Module) -> bool:
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning

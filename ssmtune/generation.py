"""Text from a model, and the likelihood of given texts, in batches of texts of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ssmtune.data import IGNORED, Collator, Encoded, Example, encode, encode_prompt
from ssmtune.likelihood import evaluating, pad_id, target_losses
from ssmtune.long_inputs import chunked_losses


class TargetScore(NamedTuple):
    """Summed natural-log probability of a target after its prompt, and the number of tokens in it."""

    log_likelihood: float
    tokens: int


def generate_texts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_length: int | None = None,
    use_cache: bool = True,
    adapters: Sequence[str | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue each prompt, stopping at the end-of-text token; greedy unless a temperature is given.

    Args:
        prompts: texts of any lengths; batches are made of similar lengths and padded on the left.
        max_length: tokens of a prompt that are kept, from its end; None for all.
        use_cache: False recomputes the whole text for every token, which is slow and gives the same.
        adapters: the adapter of the model that continues each prompt, None for the base; by default the active ones
            continue all. A batch may have any of them.
        progress: called after each batch with the number of its prompts.

    Returns:
        The new text alone, one for each prompt in their order.
    """
    encoded = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    options: dict = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    padding = pad_id(tokenizer)
    collate = Collator(padding, side="left")
    device = next(model.parameters()).device
    texts: list[str] = [""] * len(prompts)
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for chosen in _batches(encoded, batch_size):
            batch = collate([Encoded(encoded[index], encoded[index]) for index in chosen])
            if adapters is not None:
                options["adapter_names"] = [adapters[index] or "__base__" for index in chosen]
            output = model.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding,
                use_cache=use_cache,
                **options,
            )
            new = output[:, batch["input_ids"].shape[1] :]
            for index, row in zip(chosen, new.tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    row = row[: row.index(tokenizer.eos_token_id)]
                texts[index] = tokenizer.decode(row, skip_special_tokens=True)
            if progress is not None:
                progress(len(chosen))
    return texts


def target_log_likelihood(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 16,
    *,
    max_length: int | None = None,
    add_eos: bool = False,
) -> list[TargetScore]:
    """Score each target after its prompt.

    Args:
        prompts, targets: one target for each prompt, joined as they are.
        max_length: cut as in training; None for never.
        add_eos: count the end-of-text token as the target's last.

    Returns:
        One (log_likelihood, tokens) for each pair, in their order. exp(-sum / tokens) is the perplexity.
    """
    examples = [Example(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    encoded = [encode(tokenizer, example, max_length, add_eos=add_eos) for example in examples]
    return score_encoded(model, encoded, pad_id(tokenizer), batch_size)


def score_encoded(
    model: nn.Module, encoded: Sequence[Encoded], padding: int, batch_size: int, chunk_length: int | None = None
) -> list[TargetScore]:
    """Score the labelled tokens of encoded examples, in their order; with a chunk length, so many tokens at once."""
    collate = Collator(padding)
    device = next(model.parameters()).device
    scores: list[TargetScore] = [TargetScore(0.0, 0)] * len(encoded)
    with evaluating(model):
        for chosen in _batches([item.input_ids for item in encoded], batch_size):
            batch = {key: value.to(device) for key, value in collate([encoded[index] for index in chosen]).items()}
            if chunk_length is None:
                losses = target_losses(model, batch).double().sum(1)
            else:
                losses = chunked_losses(model, batch, chunk_length)
            counts = (batch["labels"] != IGNORED).sum(1)
            for index, loss, count in zip(chosen, losses.tolist(), counts.tolist(), strict=True):
                scores[index] = TargetScore(-loss, count)
    return scores


def _batches(encoded: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar lengths, the longest first so that a lack of memory shows at once."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

"""Long inputs in pieces: losses and gradients chunk by chunk, the state of the model carried from each to the next.

What a model of mixers knows of the tokens before a chunk is the states they leave behind, of one size however many they
are. So a chunk can be run by itself, and the memory of a step is that of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune.data import IGNORED
from ssmtune.likelihood import innermost, next_token_losses
from ssmtune.mixers import find_mixers
from ssmtune.mixers.continuation import cache_of, check_continues, holds_states_alone, states_of
from ssmtune.prompt_tuning import cache_name

GRADIENTS = ("exact", "truncated")


class _Chunk(NamedTuple):
    """Some columns of a batch: tokens, their mask, and what follows each of them."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor


def chunked_backward(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    chunk_length: int,
    *,
    gradients: str = "exact",
    divisor: Tensor | float | None = None,
    base: nn.Module | None = None,
) -> Tensor:
    """Forward and backward over a batch of long sequences, in the memory of one chunk.

    "exact" adds the gradients of the whole sequences to the parameters. It runs the chunks forward, keeping nothing but
    the states between them; then, from the last to the first, it runs each again and back, and hands the gradient of
    the states it started from to the chunk before: about a third more work. "truncated" runs each once, forward and
    back, and lets no gradient pass from a chunk to the one before (truncated backpropagation through
    time): what a token does to losses of later chunks is not learnt, and an initial state learns from the first chunk
    alone.

    Args:
        model: a causal language model of Mamba or Mamba-2 mixers alone, patched; with or without adapters of peft.
        batch: input_ids, attention_mask and labels, each (batch, seqlen), padded on the right.
        chunk_length: tokens of a chunk.
        gradients: "exact" or "truncated".
        divisor: what the sum of the losses is divided by; the number of labelled tokens unless told otherwise.
        base: the model inside `model` if that is a wrapper of another kind, such as DistributedDataParallel.

    Returns:
        The loss, without a graph.

    Raises:
        ValueError: the model has attention layers, is not patched, has virtual tokens in front of its embeddings, or
            runs under gradient checkpointing; or an argument has no meaning.
    """
    if gradients not in GRADIENTS:
        raise ValueError(
            f"gradients is {gradients!r}, expected {' or '.join(map(repr, GRADIENTS))}.\n"
            "  It says whether a gradient passes from a chunk to the one before. Leave it out for 'exact'."
        )
    run = _Run(model, base)
    chunks = _split(batch, chunk_length)
    if divisor is None:
        divisor = sum((chunk.targets != IGNORED).sum() for chunk in chunks).clamp_min(1)
    over = _exact if gradients == "exact" else _truncated
    return sum(over(run, chunks, divisor))


@torch.no_grad()
def chunked_losses(model: nn.Module, batch: Mapping[str, Tensor], chunk_length: int) -> Tensor:
    """The cross-entropy of the labelled tokens of each row, summed in float64, in the memory of one chunk.

    Args:
        model, batch, chunk_length: as of `chunked_backward`.

    Returns:
        (batch,) float64.
    """
    run, states, total = _Run(model), None, batch["input_ids"].new_zeros((), dtype=torch.float64)
    for chunk in _split(batch, chunk_length):
        losses, states = run(chunk, states)
        total = total + losses.double().sum(1)
    return total


class _Run:
    """A model that runs chunks, each from the states that the one before left behind."""

    def __init__(self, model: nn.Module, base: nn.Module | None = None):
        self.model, self.base = model, base
        unwrapped = model if base is None else base
        check_chunkable(unwrapped)
        self.config, self.cache_name = innermost(unwrapped).config, cache_name(innermost(unwrapped))

    def __call__(self, chunk: _Chunk, states: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The losses (batch, positions) of a chunk, and the states after it."""
        cache = cache_of(self.config, states)
        inputs = {"input_ids": chunk.input_ids, "attention_mask": chunk.attention_mask, self.cache_name: cache}
        losses = next_token_losses(self.model, chunk.targets, self.base, **inputs, use_cache=True)
        return losses, states_of(cache)


def _exact(run: _Run, chunks: Sequence[_Chunk], divisor: Tensor | float) -> Iterator[Tensor]:
    """The losses of the chunks, the last first; their gradients are added to those of the parameters."""
    device = chunks[0].input_ids.device
    kept: list[Tensor] = []
    draws: list[Any] = []
    states = None
    with torch.no_grad():
        for index, chunk in enumerate(chunks[:-1]):
            draws.append(_random_state(device))
            # Without targets no logits are made.
            _, states = run(chunk._replace(targets=chunk.targets[:, :0]), states)
            # Apart from what a chunk allocates: among it they would keep the heap from being used again.
            kept = kept or [state.new_empty(len(chunks) - 1, *state.shape) for state in states]
            for places, state in zip(kept, states, strict=True):
                places[index] = state
    ends: list[Tensor] = []
    for index in reversed(range(len(chunks))):
        start = [places[index - 1].requires_grad_() for places in kept] if index > 0 else []
        with _drawing_again(draws[index], device) if index < len(draws) else nullcontext():
            losses, states = run(chunks[index], start or None)
            loss = losses.sum() / divisor
        # The last states, which nothing reads, have none.
        gradients = [state.grad for state in ends]
        _backward([loss, *states[: len(ends)]], [None, *gradients])
        ends = start
        yield loss.detach()


def _truncated(run: _Run, chunks: Sequence[_Chunk], divisor: Tensor | float) -> Iterator[Tensor]:
    """The losses of the chunks, in order; their gradients are added to those of the parameters."""
    states = None
    for chunk in chunks:
        with torch.set_grad_enabled(bool((chunk.targets != IGNORED).any())):
            losses, states = run(chunk, states)
            loss = losses.sum() / divisor
        _backward([loss], [None])
        states = [state.detach() for state in states]
        yield loss.detach()


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Backward from those of the tensors that depend on what is trained."""
    pairs = [pair for pair in zip(tensors, gradients, strict=True) if pair[0].requires_grad]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        # What autocast chose for the forward pass is in the graph.
        with torch.autocast(tensors[0].device.type, enabled=False):
            torch.autograd.backward(tensors, gradients)


def _split(batch: Mapping[str, Tensor], chunk_length: int) -> list[_Chunk]:
    if chunk_length < 1:
        raise ValueError(
            f"chunk_length is {chunk_length}, expected at least 1.\n"
            "  It is the tokens that are run at once: thousands, as many as fit into memory."
        )
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    columns = (batch["input_ids"], batch["attention_mask"], targets)
    return [_Chunk(*pieces) for pieces in zip(*(tensor.split(chunk_length, dim=1) for tensor in columns), strict=True)]


def check_chunkable(model: nn.Module) -> None:
    """Refuse a model that cannot be run in chunks.

    Raises:
        ValueError: with the reason and a way out.
    """
    config = innermost(model).config
    if not find_mixers(model) or not holds_states_alone(cache_of(config, None)):
        raise ValueError(
            f"{type(innermost(model)).__name__} cannot be run in chunks: it has attention layers, which look back at "
            "every token.\n  What they read grows with the text, where a state does not. Take a model of Mamba or "
            "Mamba-2 mixers alone,\n  or shorter texts and gradient checkpointing."
        )
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} cannot be trained in chunks: its virtual tokens are no part "
            "of the text that is cut.\n  Initial State Tuning writes to the state instead; or take shorter texts."
        )
    check_continues(model, "a text in chunks")


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _drawing_again(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw what was drawn from a state of the generators on, and leave them as they are."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield

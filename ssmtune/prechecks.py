"""What is checked of a method before it is trained: a comparison of methods that do not work compares nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmtune.data import Collator, Encoded, encode_prompt
from ssmtune.generation import pad_id
from ssmtune.gradcheck import check_gradients
from ssmtune.methods import Method

# Relative to the largest logit: an adapter of zeros adds nothing, so this is rounding.
START_TOLERANCE = 1e-5
# The same sums in another order; a state that is lost or read twice is off by far more.
CACHE_TOLERANCE = 1e-3
NOISE = 0.05
NEW_TOKENS = 8


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `passed` is None where it does not apply."""

    name: str
    passed: bool | None
    detail: str


@torch.no_grad()
def text_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits at the tokens of a batch, without those of a trained prompt before them; (tokens, vocab) without pads."""
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
    return logits[inputs["attention_mask"].bool()].float()


def run_prechecks(
    model: nn.Module,
    tokenizer,
    method: Method,
    batch: Mapping[str, Tensor],
    prompts: Sequence[str],
    base_logits: Tensor,
) -> list[Check]:
    """Check a model that a method was just applied to; it is left as it was.

    known start: it computes what the base computes.
    gradients: every trainable tensor gets one.
    cached generation: token by token from the cached state it computes the same as without a cache; checked with noise
    in the adapter, since an adapter of zeros could not be wrong, and with padding, since prompts differ in length.

    Args:
        batch: input_ids, attention_mask and labels of some training examples, padded on the right.
        prompts: what to continue; of several lengths, so that they are padded.
        base_logits: `text_logits` of the base model on `batch`.
    """
    was_training = model.training
    model.eval()
    try:
        checks = [_known_start(model, method, batch, base_logits)]
        report = check_gradients(model, batch)
        checks.append(Check("gradients", report.ok, str(report).removeprefix("warning: ")))
        with _noise_in_adapter(model, method):
            checks.append(_cached_generation(model, tokenizer, prompts))
        return checks
    finally:
        model.train(was_training)


def _known_start(model: nn.Module, method: Method, batch: Mapping[str, Tensor], base_logits: Tensor) -> Check:
    if method.kind == "prompt":
        return Check("known start", None, "starts from random virtual tokens, not from the base model")
    error = (text_logits(model, batch) - base_logits).abs().max().item() / base_logits.abs().max().item()
    return Check("known start", error <= START_TOLERANCE, f"logits differ from the base by {error:.1e} of the largest")


def _cached_generation(model: nn.Module, tokenizer, prompts: Sequence[str]) -> Check:
    encoded = [Encoded(tokens, tokens) for tokens in (encode_prompt(tokenizer, prompt) for prompt in prompts)]
    batch = Collator(pad_id(tokenizer), side="left")(encoded)
    device = next(model.parameters()).device
    steps = []
    for use_cache in (True, False):
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad_id(tokenizer),
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps.append(torch.stack(output.logits).float())
    cached, uncached = steps
    error = (cached - uncached).abs().max().item() / uncached.abs().max().item()
    return Check(
        "cached generation",
        error <= CACHE_TOLERANCE,
        f"the logits of {NEW_TOKENS} new tokens differ by {error:.1e} of the largest from those without a cache",
    )


@contextmanager
def _noise_in_adapter(model: nn.Module, method: Method) -> Iterator[None]:
    if method.kind == "full":
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trainable]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trainable:
                noise = torch.randn(parameter.shape, generator=generator) * NOISE
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trainable, kept, strict=True):
                parameter.copy_(value)

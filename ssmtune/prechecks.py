"""What is checked of a method before it is trained: a comparison of methods that do not work compares nothing."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmtune.data import Collator, Encoded, encode_prompt
from ssmtune.generation import pad_id
from ssmtune.gradcheck import check_gradients
from ssmtune.methods import Method
from ssmtune.mixers import find_mixers, patch
from ssmtune.models import no_progress_bars
from ssmtune.stored_adapters import load_adapter
from ssmtune.weights import save_weights

# Relative to the largest logit: an adapter of zeros adds nothing, and a stored one is the same numbers.
ROUNDING = 1e-5
# The same sums in another order; a state that is lost or read twice is off by far more.
REORDERING = 1e-3
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
    base: nn.Module,
    tokenizer,
    method: Method,
    batch: Mapping[str, Tensor],
    prompts: Sequence[str],
) -> list[Check]:
    """Check a model that a method was just applied to; it is left as it was.

    known start: it computes what the base computes.
    gradients: every trainable tensor gets one.
    cached generation: token by token from the cached state it computes the same as without a cache.
    left padding: after pads on the left it generates what it does without any.
    save and load: stored, and loaded onto the base again, it computes the same.

    The last three are checked with noise in the adapter, since an adapter of zeros could not be wrong.

    Args:
        base: the model as it was before.
        batch: input_ids, attention_mask and labels of some training examples, padded on the right.
        prompts: what to continue, of several lengths; the end of one is continued as well, so that there are pads.
    """
    was_training = model.training
    model.eval()
    try:
        checks = [_known_start(model, base, method, batch)]
        report = check_gradients(model, batch)
        checks.append(Check("gradients", report.ok, str(report).removeprefix("warning: ")))
        with _noise_in_adapter(model, method):
            checks += _generation(model, tokenizer, prompts)
            checks.append(_save_and_load(model, base, method, batch))
        return checks
    finally:
        model.train(was_training)


def _known_start(model: nn.Module, base: nn.Module, method: Method, batch: Mapping[str, Tensor]) -> Check:
    if method.kind == "prompt":
        return Check("known start", None, "starts from random virtual tokens, not from the base model")
    error = _error(text_logits(base, batch), text_logits(model, batch))
    return Check("known start", error <= ROUNDING, f"logits differ from the base by {error:.1e} of the largest")


def _generation(model: nn.Module, tokenizer, prompts: Sequence[str]) -> list[Check]:
    texts = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(texts, key=len)
    texts.append(longest[len(longest) // 2 :])
    shortest = min(range(len(texts)), key=lambda index: len(texts[index]))
    cached = _generated_logits(model, tokenizer, texts)
    cache = _generation_error(_generated_logits(model, tokenizer, texts, use_cache=False), cached)
    alone = _generated_logits(model, tokenizer, [texts[shortest]])
    padding = _generation_error(alone, cached[:, shortest : shortest + 1])
    return [
        Check(name, error <= REORDERING, f"the logits of {NEW_TOKENS} new tokens differ by {error:.1e} of the largest")
        for name, error in (("cached generation", cache), ("left padding", padding))
    ]


def _generated_logits(model: nn.Module, tokenizer, texts: Sequence[list[int]], use_cache: bool = True) -> Tensor:
    """The logits that greedy generation chose by, (steps, texts, vocab)."""
    batch = Collator(pad_id(tokenizer), side="left")([Encoded(tokens, tokens) for tokens in texts])
    device = next(model.parameters()).device
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
    return torch.stack(output.logits).float()


def _generation_error(expected: Tensor, actual: Tensor) -> float:
    """The error of logits along generation, of each text as long as both have chosen the same tokens."""
    same = (expected.argmax(-1) == actual.argmax(-1)).cummin(0).values
    same = torch.cat([torch.ones_like(same[:1]), same[:-1]])
    return _error(expected[same], actual[same])


def _save_and_load(model: nn.Module, base: nn.Module, method: Method, batch: Mapping[str, Tensor]) -> Check:
    with tempfile.TemporaryDirectory(prefix="ssmtune-") as folder:
        save_weights(model, Path(folder))
        if method.kind == "full":
            with no_progress_bars():
                loaded = type(base).from_pretrained(folder, dtype=base.dtype).to(base.device).eval()
            if find_mixers(base):
                patch(loaded)
        else:
            loaded = load_adapter(copy.deepcopy(base), folder)
    error = _error(text_logits(model, batch), text_logits(loaded, batch))
    return Check("save and load", error <= ROUNDING, f"logits differ by {error:.1e} of the largest after loading")


def _error(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


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

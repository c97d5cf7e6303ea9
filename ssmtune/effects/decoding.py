"""How long a model takes to write a token."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from ssmtune.likelihood import pad_id

TOKENS = 32


def decoding_milliseconds(model: nn.Module, tokenizer, prompt: str, tokens: int = TOKENS) -> float:
    """Median wall time per token of greedy decoding of one text, the reading of the prompt included."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in tokenizer(prompt, return_tensors="pt").items()}
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}

    def decode(count: int) -> None:
        length = {"max_new_tokens": count, "min_new_tokens": count}
        model.generate(**inputs, **length, do_sample=False, pad_token_id=pad_id(tokenizer))
        if device.type == "cuda":
            torch.cuda.synchronize()

    model.eval()
    decode(2)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        decode(tokens)
        times.append((time.perf_counter() - began) / tokens * 1e3)
    return statistics.median(times)

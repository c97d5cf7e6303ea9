import math

import pytest
import torch

from ssmtune.data import Example
from ssmtune.tasks.continuation import ContinuationTask


def test_evaluate_is_the_perplexity_of_the_targets(byte_model, byte_tokenizer):
    examples = [Example("The sea", " is deep"), Example("A much longer prompt than that", " it is")]
    task = ContinuationTask("toy", "perplexity", False, train=[], dev=[], test=examples)
    total, tokens = 0.0, 0
    for example in examples:
        prompt = byte_tokenizer(example.prompt)["input_ids"]
        target = byte_tokenizer(example.target)["input_ids"]
        with torch.no_grad():
            logits = byte_model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        total += sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
        tokens += len(target)
    scores = task.evaluate(byte_model, byte_tokenizer, examples)
    assert scores["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert scores["loss"] == pytest.approx(-total / tokens, rel=1e-4)
    # One token is one byte here.
    assert scores["bits_per_character"] == pytest.approx(scores["loss"] / math.log(2), rel=1e-5)

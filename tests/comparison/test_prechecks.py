import copy

import pytest
import torch
from torch import nn

from ssmtune.data import Collator, Example, encode_all
from ssmtune.methods import METHODS, apply_method
from ssmtune.models import load_model
from ssmtune.prechecks import run_prechecks


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_model(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def batch(base):
    examples = [Example("The sea", " is deep"), Example("A longer prompt", " has an end")]
    return Collator(0)(encode_all(base[1], examples).items)


def outcomes(base, batch, model, method):
    model_, tokenizer = base
    checks = run_prechecks(model, model_, tokenizer, METHODS[method], batch, ["The sea", "A longer prompt"])
    return {check.name: check.passed for check in checks}, checks


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_and_is_left_as_it_was(base, batch, method):
    model = apply_method(copy.deepcopy(base[0]), method, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    passed, checks = outcomes(base, batch, model, method)
    start = None if METHODS[method].kind == "prompt" else True
    others = dict.fromkeys(("gradients", "cached generation", "left padding", "save and load"), True)
    assert passed == {"known start": start, **others}, checks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_start_away_from_the_base_is_found(base, batch):
    model = apply_method(copy.deepcopy(base[0]), "state-offset", seed=0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(0.1)
    assert outcomes(base, batch, model, "state-offset")[0]["known start"] is False


def test_a_tensor_without_gradient_is_found(base, batch):
    model = apply_method(copy.deepcopy(base[0]), "lora", seed=0)
    model.forgotten = nn.Parameter(torch.ones(3))
    passed, checks = outcomes(base, batch, model, "lora")
    assert passed["gradients"] is False and "forgotten" in checks[1].detail


def test_generation_that_ignores_the_cache_is_found(base, batch):
    from peft import PromptTuningConfig, get_peft_model

    # peft's own prompt tuning repeats the prompt at every cached step on Mamba
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, num_attention_heads=1)
    model = get_peft_model(copy.deepcopy(base[0]), config)
    assert outcomes(base, batch, model, "prompt-tuning")[0]["cached generation"] is False


def test_pads_between_prompt_and_text_are_found(tiny_transformer, batch):
    from peft import PromptTuningConfig, get_peft_model

    # peft puts a prompt in front of the pads, which are counted as positions
    base = load_model(str(tiny_transformer))
    with torch.no_grad():
        for parameter in base[0].parameters():
            # fresh weights are so small that attention looks everywhere alike
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    model = get_peft_model(copy.deepcopy(base[0]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    passed, _ = outcomes(base, batch, model, "prompt-tuning")
    assert passed["left padding"] is False and passed["cached generation"] is True


def test_a_tensor_that_is_not_stored_is_found(base, batch):
    model = apply_method(copy.deepcopy(base[0]), "state-offset", seed=0)
    model.get_output_embeddings().weight.requires_grad_(True)
    passed, _ = outcomes(base, batch, model, "state-offset")
    assert passed["save and load"] is False and passed["left padding"] is True

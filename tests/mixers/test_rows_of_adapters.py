"""Batches in which each row has an adapter of its own, on every family."""

import pytest
import torch
from numerics import assert_close
from peft import get_peft_model

from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

FAMILIES = (
    *("mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "zamba2"),
    *("bamba", "nemotron_h", "falcon_h1", "granitemoehybrid"),
    *("qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"),
)
METHODS = {
    "offset": (StateOffsetConfig, {"rank": 2}, {"target": "y"}),
    "initial": (InitialStateConfig, {"conv_state": True}, {"rank": 2}),
}
NAMES = ["one", "__base__", "two", "one"]


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=FAMILIES)
def model(request, make_family, method):
    """Two adapters of different kinds that matter, and one more that no row has; all of them train."""
    config, one, two = method
    model = get_peft_model(make_family(request.param), config(**one, task_type="CAUSAL_LM"), adapter_name="one")
    model.add_adapter("two", config(**two, task_type="CAUSAL_LM"))
    model.add_adapter("idle", config(task_type="CAUSAL_LM"))
    model.set_requires_grad(["one", "two", "idle"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def apart(model, rows, run):
    """What `run` gives for each row in a batch of its own, with the adapter of the row active."""
    results = []
    for name, row in zip(NAMES, rows, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(row[None]))
        else:
            model.set_adapter(name)
            model.set_requires_grad(["one", "two", "idle"])
            results.append(run(row[None]))
    return torch.cat(results)


def test_trains_as_rows_apart(model, tokens):
    rows = tokens(4, 7)

    def gradients(logits):
        model.zero_grad(set_to_none=True)
        logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected_logits = apart(model, rows, lambda row: model(input_ids=row, use_cache=False).logits)
    expected = gradients(expected_logits)
    logits = model(input_ids=rows, adapter_names=NAMES, use_cache=False).logits
    actual = gradients(logits)
    assert_close("logits", expected_logits, logits, 1e-5)
    assert actual.keys() == expected.keys() and not any(".idle" in name for name in actual)
    assert {name.rpartition(".")[2] for name in actual} == {"one", "two"}
    for name, gradient in expected.items():
        assert_close(name, gradient, actual[name], 2e-5)


def test_generates_as_rows_apart(model, tokens):
    def logits(row, **kwargs):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
        out = model.generate(input_ids=row, return_dict_in_generate=True, **options, **kwargs)
        return torch.stack(out.logits, dim=1)

    model.eval()
    rows = tokens(4, 7)
    assert_close("logits", apart(model, rows, logits), logits(rows, adapter_names=NAMES), 1e-5)

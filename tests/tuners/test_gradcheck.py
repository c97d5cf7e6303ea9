import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ssmtune
from ssmtune.gradcheck import check_gradients
from ssmtune.tuners import StateOffsetConfig


@pytest.fixture
def batch(input_ids):
    return {"input_ids": input_ids, "labels": input_ids}


def lora(model, *targets, **kwargs):
    return get_peft_model(model, LoraConfig(target_modules=list(targets), r=2, **kwargs))


def test_every_variant_gets_gradients(tiny_mamba, make_config, batch):
    report = check_gradients(get_peft_model(tiny_mamba, make_config()), batch)
    assert report.ok and report.dead == ()
    assert str(report) == f"all {report.total} trainable tensors received a gradient"


def test_lora_is_not_dead_while_its_B_is_zero(tiny_mamba, batch):
    model = lora(tiny_mamba, "in_proj")
    report = check_gradients(model, batch)
    assert report.ok and report.total == 4


def test_lora_on_dt_proj_of_transformers_is_dead(tiny_mamba, batch):
    model = lora(tiny_mamba, "in_proj", "dt_proj")
    report = check_gradients(model, batch)
    assert not report.ok
    assert sorted(report.dead) == sorted(n for n, p in model.named_parameters() if p.requires_grad and "dt_proj" in n)
    assert str(report) == (
        "warning: 4 of 8 trainable tensors received no gradient: backbone.layers.0.mixer.dt_proj (lora_A, lora_B), "
        "backbone.layers.1.mixer.dt_proj (lora_A, lora_B)\n"
        "  transformers reads dt_proj.weight directly, so an adapter there has no effect.\n"
        "  Call ssmtune.patch(model), under which it has one, or remove dt_proj from target_modules."
    )


def test_lora_on_dt_proj_trains_once_patched(tiny_mamba, batch):
    ssmtune.patch(tiny_mamba)
    assert check_gradients(lora(tiny_mamba, "in_proj", "dt_proj"), batch).ok


class TwoHeads(nn.Module):
    """One head takes part in the loss by a factor, the other not at all."""

    def __init__(self, factor):
        super().__init__()
        self.used, self.scaled, self.idle = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)
        self.factor = factor

    def forward(self, x):
        loss = (self.used(x) + self.factor * self.scaled(x)).sum()
        return type("Output", (), {"loss": loss})()


def test_unused_and_zero_are_dead():
    report = check_gradients(TwoHeads(0.0), {"x": torch.ones(2, 4)})
    assert report.dead == ("idle.weight", "idle.bias", "scaled.weight", "scaled.bias")
    assert "idle (weight, bias), scaled (weight, bias)\n  They do not reach the loss." in str(report)
    model = TwoHeads(0.0)
    model.idle.requires_grad_(False)
    assert "Their gradients are zero on this batch." in str(check_gradients(model, {"x": torch.ones(2, 4)}))


def test_long_lists_are_cut(tiny_mamba, batch):
    model = lora(tiny_mamba, "dt_proj", "in_proj")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_base_model().backbone.layers[0].mixer.dt_proj.requires_grad_(True)
    extra = nn.ModuleList(nn.Linear(1, 1) for _ in range(5))
    model.add_module("extra", extra)
    message = str(check_gradients(model, batch))
    assert message.splitlines()[0].endswith(", …") and message.splitlines()[0].count("extra.") == 2


def test_everything_is_left_as_it_was(tiny_mamba, batch):
    model = lora(tiny_mamba, "in_proj", lora_dropout=0.5).eval()
    model.get_base_model().backbone.layers[0].train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    assert check_gradients(model, batch).ok
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(g is None or (g == 3).all() for g in gradients)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_left_as_it_was_after_an_error(tiny_mamba, input_ids):
    model = lora(tiny_mamba, "in_proj").eval()
    with pytest.raises(ValueError, match="returned no loss for a batch of input_ids(.|\n)*labels"):
        check_gradients(model, {"input_ids": input_ids})
    assert not any(module.training for module in model.modules())


def test_works_without_gradient_mode_and_with_checkpointing(tiny_mamba, batch):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with torch.no_grad():
        assert check_gradients(model, batch).ok


def test_nothing_trainable_is_an_error(tiny_mamba, batch):
    with pytest.raises(ValueError, match="MambaForCausalLM has no trainable tensor"):
        check_gradients(tiny_mamba.requires_grad_(False), batch)


def test_loss_without_a_graph(tiny_mamba, batch):
    tiny_mamba.requires_grad_(False)
    tiny_mamba.extra = nn.Linear(1, 1)
    report = check_gradients(tiny_mamba, batch)
    assert report.dead == ("extra.weight", "extra.bias")

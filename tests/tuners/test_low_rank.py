"""The low-rank product: its scale and its dropout, against plain matrix products."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import ssmtune
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

METHODS = [StateOffsetConfig, InitialStateConfig]


def first_layer(model):
    return next(m for m in model.modules() if isinstance(m, ssmtune.mixers.StateAdapter))


def handed_over(model):
    """The matrix that the first mixer gets."""
    inputs = first_layer(model).state_inputs()
    return inputs.state_offset if inputs.initial_state is None else inputs.initial_state


@pytest.mark.parametrize("config_cls", METHODS)
@pytest.mark.parametrize("alpha", [None, 6])
def test_the_matrix_is_the_scaled_product(tiny_mamba, make_nonzero, config_cls, alpha):
    model = make_nonzero(get_peft_model(tiny_mamba, config_cls(rank=3, alpha=alpha)))
    layer = first_layer(model)
    B, A = layer.tensors("B")["default"], layer.tensors("A")["default"]
    assert B.shape == (64, 3) and A.shape == (3, 8)
    torch.testing.assert_close(handed_over(model), (1 if alpha is None else 2) * B @ A)


@pytest.mark.parametrize("config_cls", METHODS)
def test_dropout_leaves_out_whole_terms_in_training(tiny_mamba, make_nonzero, config_cls):
    model = make_nonzero(get_peft_model(tiny_mamba, config_cls(rank=4, alpha=2, dropout=0.25)))
    layer = first_layer(model)
    B, A = layer.tensors("B")["default"], layer.tensors("A")["default"]
    model.train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        kept = torch.nn.functional.dropout(torch.ones(4, 1), 0.25)
        torch.manual_seed(seed)
        torch.testing.assert_close(handed_over(model), 0.5 * B @ (kept * A))
        seen.add(int((kept == 0).sum()))
    assert {0, 1} <= seen
    model.eval()
    torch.testing.assert_close(handed_over(model), 0.5 * B @ A)


def test_dropout_keeps_the_mean(tiny_mamba, make_nonzero):
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(rank=4, dropout=0.5)))
    expected = handed_over(model.eval()).detach()
    model.train()
    with torch.no_grad():
        mean = torch.stack([handed_over(model) for _ in range(4000)]).mean(0)
    assert (mean - expected).abs().max() < 0.25 and expected.abs().max() > 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_drops_the_same_terms_again(tiny_mamba, make_nonzero, input_ids, use_reentrant):
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(rank=4, dropout=0.5))).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_dropout_is_stored_and_belongs_to_its_adapter(tiny_mamba, make_nonzero, tmp_path):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(rank=2, dropout=0.5))
    model.add_adapter("other", StateOffsetConfig(rank=2))
    make_nonzero(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.set_adapter("other")
    assert torch.equal(handed_over(model.train()), handed_over(model.eval()))
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    assert loaded.active_peft_config.dropout == 0.5
    assert first_layer(loaded).dropout == {"default": 0.5}

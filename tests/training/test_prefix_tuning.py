"""Prefix tuning of a transformer, through peft."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from ssmtune.config import ConfigError
from ssmtune.likelihood import target_losses
from ssmtune.methods import apply_method
from ssmtune.prompt_tuning import add_prefix
from ssmtune.stored_adapters import load_adapter
from ssmtune.weights import save_weights

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(params=["GPTNeoX", "Llama"])
def base(request):
    """A random model whose attention depends on what it sees."""
    if request.param == "Llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(64, (2, 7))


@torch.no_grad()
def test_a_fresh_prefix_is_what_random_tokens_leave(base, tokens, assert_close):
    torch.manual_seed(3)
    drawn = torch.randint(64, (1, 5))
    expected = base(torch.cat([drawn.expand(2, -1), tokens], dim=1)).logits[:, 5:]
    torch.manual_seed(3)
    adapted = add_prefix(base, 5, None)
    assert_close("logits", expected, adapted(tokens).logits, 1e-5)


def test_the_loss_is_that_of_the_text_alone(base, tokens, assert_close):
    labels = tokens.clone()
    labels[:, :3] = -100
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    adapted = add_prefix(base, 5, None)
    losses = target_losses(adapted, batch)
    logits = adapted(input_ids=tokens).logits[:, 2:-1].log_softmax(-1)
    assert_close("losses", -logits.gather(2, tokens[:, 3:, None])[..., 0], losses, 1e-5)
    assert_close("mean", adapted(**batch).loss, losses.mean(), 1e-5)


@torch.no_grad()
def test_an_mlp_is_folded_when_saved(base, tokens, tmp_path, assert_close):
    adapted = apply_method(base, "prefix-tuning-mlp", {"virtual_tokens": 5, "reparametrize": 4}).eval()
    assert any("transform" in name for name, _ in adapted.named_parameters())
    expected = adapted(tokens).logits
    save_weights(adapted, tmp_path)
    loaded = load_adapter(adapted.get_base_model(), tmp_path)
    assert not any("transform" in name for name, _ in loaded.named_parameters())
    assert_close("logits", expected, loaded(tokens).logits, 1e-6)


def test_what_a_prefix_cannot_do_is_refused(base, tokens):
    with pytest.raises(ConfigError, match="has a prefix in all layers or in none"):
        apply_method(base, "prefix-tuning", {"layers": [0]})
    adapted = add_prefix(base, 5, None).train()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
        adapted(tokens)

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import ssmtune
from ssmtune import InitialStateConfig
from ssmtune.mixers import find_mixers
from ssmtune.tuners.virtual_tokens import start_from_tokens


def adapted(model, tokens, hidden=None, **options):
    config = InitialStateConfig(task_type="CAUSAL_LM", virtual_tokens=tokens, reparametrize=hidden, **options)
    return get_peft_model(model, config)


def prefixes(model):
    return [mixer.start_adapter.virtual_tokens["default"] for _, mixer in find_mixers(model)]


def with_tokens_in_front(model, input_ids):
    """Logits where every mixer runs over its virtual tokens and the text, and drops the outputs of the former."""
    base = copy.deepcopy(model).unload()
    ssmtune.patch(base)
    for (_, mixer), prefix in zip(find_mixers(base), prefixes(model), strict=True):
        tokens = prefix.tokens
        if prefix.inner is not None:
            tokens = tokens + prefix.outer(torch.tanh(prefix.inner(tokens)))
        count = tokens.shape[0]

        def prepend(_, args, kwargs, tokens=tokens):
            states = args[0] if args else kwargs.pop("hidden_states")
            return (torch.cat([tokens.expand(len(states), -1, -1), states], dim=1),), kwargs | {"cache_params": None}

        mixer.register_forward_pre_hook(prepend, with_kwargs=True)
        mixer.register_forward_hook(lambda _, args, output, count=count: output[:, count:])
    return base(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("hidden", [None, 5])
def test_the_state_is_what_the_virtual_tokens_leave(tiny_mamba, assert_close, tmp_path, tokens, hidden):
    model = adapted(tiny_mamba, tokens, hidden)
    if hidden is not None:
        for prefix in prefixes(model):
            torch.nn.init.normal_(prefix.outer.weight)
    input_ids = torch.randint(0, 64, (2, 6))
    expected = with_tokens_in_front(model, input_ids)
    actual = model(input_ids=input_ids).logits
    assert_close("logits", expected, actual, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.peft_config["default"].virtual_tokens is None
    assert {name.split(".")[-2] for name, _ in loaded.named_parameters() if "start_adapter" in name} == {
        "initial_state_h",
        "initial_state_conv",
    }
    with torch.no_grad():
        assert_close("folded", expected, loaded(input_ids=input_ids).logits, 1e-5)


def test_gradients_are_those_of_running_with_the_virtual_tokens(tiny_mamba, assert_close):
    model = adapted(tiny_mamba, 5)
    input_ids = torch.randint(0, 64, (2, 6))
    weight = torch.randn(2, 6, 64)
    (model(input_ids=input_ids).logits * weight).sum().backward()
    for layer, prefix in enumerate(prefixes(model)):
        step = torch.randn_like(prefix.tokens)
        sums = []
        with torch.no_grad():
            for sign in (1, -1):
                prefix.tokens.add_(sign * 1e-2 * step)
                sums.append((with_tokens_in_front(model, input_ids).double() * weight).sum())
                prefix.tokens.sub_(sign * 1e-2 * step)
        expected = (sums[0] - sums[1]) / 2e-2
        assert_close(f"layer {layer}", expected, (prefix.tokens.grad.double() * step).sum(), 2e-3)


def test_what_is_kept_for_generation_follows_every_change(tiny_mamba):
    ssmtune.patch(tiny_mamba)
    model = adapted(tiny_mamba, 3).eval()
    input_ids = torch.randint(0, 64, (1, 4))
    with torch.no_grad():
        before = model(input_ids=input_ids).logits
        assert torch.equal(model(input_ids=input_ids).logits, before)
        prefixes(model)[0].tokens.mul_(2)
        changed = model(input_ids=input_ids).logits
        tiny_mamba.backbone.layers[0].mixer.x_proj.weight.mul_(2)
        changed_again = model(input_ids=input_ids).logits
    assert not torch.equal(changed, before) and not torch.equal(changed_again, changed)
    assert torch.equal(model(input_ids=input_ids).logits, changed_again)


def test_the_virtual_tokens_go_through_an_adapted_projection(tiny_mamba, assert_close):
    get_peft_model(tiny_mamba, LoraConfig(target_modules=["in_proj"], init_lora_weights=False), adapter_name="low")
    config = InitialStateConfig(task_type="CAUSAL_LM", virtual_tokens=4)
    model = get_peft_model(tiny_mamba, config, adapter_name="default")
    input_ids = torch.randint(0, 64, (2, 6))
    actual = model(input_ids=input_ids).logits
    assert_close("logits", with_tokens_in_front(model, input_ids), actual, 1e-5)


def test_a_starting_cache_holds_the_folded_prefix(tiny_mamba, assert_close):
    model = adapted(tiny_mamba, 2)
    input_ids = torch.randint(0, 64, (2, 5))
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        cache = ssmtune.starting_cache(model, 2)
        base = model.unload()
        ssmtune.patch(base)
        assert_close("logits", expected, base(input_ids=input_ids, cache_params=cache).logits, 1e-5)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="virtual_tokens=4 does not go with rank=2"):
        InitialStateConfig(virtual_tokens=4, rank=2)
    with pytest.raises(ValueError, match="virtual_tokens must be None or an integer of at least 1, got 0"):
        InitialStateConfig(virtual_tokens=0)


@pytest.mark.parametrize("hidden", [None, 5])
def test_it_can_start_as_if_the_model_had_read_a_text(tiny_mamba, assert_close, hidden):
    ssmtune.patch(tiny_mamba)
    text, input_ids = torch.randint(0, 64, (1, 7)), torch.randint(0, 64, (2, 5))
    with torch.no_grad():
        expected = tiny_mamba(input_ids=torch.cat([text.expand(2, -1), input_ids], dim=1)).logits[:, 7:]
        model = adapted(tiny_mamba, 7, hidden)
        start_from_tokens(model, text)
        assert_close("logits", expected, model(input_ids=input_ids).logits, 1e-5)


def test_a_text_cannot_become_virtual_tokens(tiny_mamba):
    model = adapted(tiny_mamba, 2)
    with pytest.raises(ValueError, match="cannot be given a state"):
        ssmtune.initial_state_from_text(model, lambda text: {"input_ids": [1, 2]}, "a text")

"""A text as an initial state, and an initial state as a starting cache."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconMambaConfig, JambaConfig, ZambaConfig

import ssmtune
from ssmtune import InitialStateConfig, StateOffsetConfig, initial_state_from_text, starting_cache
from ssmtune.tuners import InitialStateLayer

TEXT = "the sea is blue and the sun is red"
EXACT = {"conv_state": True, "task_type": "CAUSAL_LM"}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture
def base(tiny_checkpoint):
    """A random model whose states matter: what it has read shows in its logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    ssmtune.patch(model)
    return model


@pytest.fixture
def prompts():
    return torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))


def after_text(base, tokenizer, prompts, logits):
    """The logits of the base at the prompts, when the text stands before each of them."""
    text = torch.tensor([tokenizer(TEXT)["input_ids"]]).expand(len(prompts), -1)
    return logits(base, torch.cat([text, prompts], dim=1))[:, text.shape[1] :]


@pytest.mark.parametrize("options", [{}, {"reparametrize": 3}, {"rank": 8}, {"inference_scale": 0.5}], ids=str)
@pytest.mark.parametrize("seqlen", [1, 2, 5])
def test_a_text_read_in_is_a_text_before_the_prompt(base, tokenizer, prompts, logits, assert_close, options, seqlen):
    prompts = prompts[:, :seqlen]
    expected = after_text(base, tokenizer, prompts, logits)
    assert (expected - logits(base, prompts)).abs().max() > 0.01
    model = get_peft_model(base, InitialStateConfig(**EXACT, **options))
    assert initial_state_from_text(model, tokenizer, TEXT) == len(tokenizer(TEXT)["input_ids"])
    assert_close("logits", expected, logits(model, prompts), 1e-5)


def test_what_the_adapter_held_before_does_not_matter(base, tokenizer, prompts, logits, assert_close, make_nonzero):
    expected = after_text(base, tokenizer, prompts, logits)
    model = make_nonzero(get_peft_model(base, InitialStateConfig(**EXACT, reparametrize=3)))
    initial_state_from_text(model, tokenizer, TEXT, adapter_name="default")
    assert_close("logits", expected, logits(model, prompts), 1e-5)
    assert any(p.requires_grad for p in model.parameters())


def test_a_text_as_short_as_one_token(base, tokenizer, prompts, logits, assert_close):
    first = torch.tensor([[int(tokenizer("t")["input_ids"][0])]]).expand(2, 1)
    expected = logits(base, torch.cat([first, prompts], dim=1))[:, 1:]
    model = get_peft_model(base, InitialStateConfig(**EXACT))
    assert initial_state_from_text(model, tokenizer, "t") == 1
    assert_close("logits", expected, logits(model, prompts), 1e-5)


def test_left_padded_prompts_start_from_the_text_too(base, tokenizer, prompts, logits, assert_close):
    model = get_peft_model(base, InitialStateConfig(**EXACT))
    initial_state_from_text(model, tokenizer, TEXT)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    actual = logits(model, prompts * mask, attention_mask=mask)
    assert_close("whole", logits(model, prompts[:1]), actual[:1], 1e-5)
    assert_close("padded", logits(model, prompts[1:, 3:]), actual[1:, 3:], 1e-5)


def test_the_state_alone_leaves_the_convolution_at_zero(base, tokenizer, prompts, logits):
    expected = after_text(base, tokenizer, prompts, logits)
    model = get_peft_model(base, InitialStateConfig())
    initial_state_from_text(model, tokenizer, TEXT)
    with model.disable_adapter():
        without = (logits(model, prompts) - expected).abs().mean()
    assert 1e-3 < (logits(model, prompts) - expected).abs().mean() < without


def test_a_rank_gets_the_nearest_states_of_it(base, tokenizer):
    model = get_peft_model(base, InitialStateConfig())
    initial_state_from_text(model, tokenizer, TEXT)
    model.add_adapter("low", InitialStateConfig(rank=2, alpha=6))
    initial_state_from_text(model, tokenizer, TEXT, "low")
    for layer in (m for m in model.modules() if isinstance(m, InitialStateLayer)):
        U, S, Vh = torch.linalg.svd(layer.value("h", "default").detach(), full_matrices=False)
        nearest = U[:, :2] * S[:2] @ Vh[:2]
        torch.testing.assert_close(layer.value("h", "low"), nearest, rtol=1e-4, atol=1e-5)
        assert (nearest - layer.value("h", "default")).abs().max() > 1e-3


def test_modes_and_gradients_are_as_before(base, tokenizer):
    model = get_peft_model(base, InitialStateConfig(**EXACT)).train()
    model.get_submodule("base_model.model.backbone.layers.1").eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    with model.disable_adapter():
        disabled = {name: p.requires_grad for name, p in model.named_parameters()}
        initial_state_from_text(model, tokenizer, TEXT)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == disabled
    initial_state_from_text(model, tokenizer, TEXT)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_lora_and_offsets_take_part_in_reading(base, tokenizer, prompts, logits, assert_close, make_nonzero):
    get_peft_model(base, LoraConfig(target_modules=["in_proj"], r=2), adapter_name="low")
    get_peft_model(base, StateOffsetConfig(), adapter_name="shift")
    make_nonzero(base, std=0.1)
    expected = after_text(base, tokenizer, prompts, logits)
    get_peft_model(base, InitialStateConfig(**EXACT), adapter_name="start")
    initial_state_from_text(base, tokenizer, TEXT)
    assert_close("logits", expected, logits(base, prompts), 1e-5)


def test_training_goes_on_from_the_text(base, tokenizer, prompts):
    model = get_peft_model(base, InitialStateConfig(**EXACT))
    initial_state_from_text(model, tokenizer, TEXT)
    assert ssmtune.check_gradients(model, {"input_ids": prompts, "labels": prompts}).ok


def test_errors(base, tokenizer):
    with pytest.raises(ValueError, match="MambaForCausalLM has no adapter of Initial State Tuning"):
        initial_state_from_text(base, tokenizer, TEXT)
    model = get_peft_model(base, InitialStateConfig())
    with pytest.raises(ValueError, match="has no tokens"):
        initial_state_from_text(model, tokenizer, "")
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        initial_state_from_text(model, tokenizer, TEXT, "other")
    model.add_adapter("other", InitialStateConfig())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"cannot tell which adapter gets the text: \['default', 'other'\]"):
        initial_state_from_text(model, tokenizer, TEXT)


@pytest.mark.parametrize("options", [{}, {"conv_state": True}, {"layers_to_transform": [1]}], ids=str)
@pytest.mark.parametrize("seqlen", [1, 2, 5])
def test_the_base_generates_the_same_from_a_starting_cache(base, prompts, make_nonzero, options, seqlen):
    plain, prompts = copy.deepcopy(base), prompts[:, :seqlen]
    model = make_nonzero(get_peft_model(base, InitialStateConfig(task_type="CAUSAL_LM", **options)), std=3.0)
    expected = model.generate(input_ids=prompts, **GREEDY)
    assert not torch.equal(plain.generate(prompts, **GREEDY), expected)
    assert torch.equal(plain.generate(prompts, cache_params=starting_cache(model, 2), **GREEDY), expected)


def test_beams_need_a_row_each(base, prompts, make_nonzero):
    plain = copy.deepcopy(base)
    model = make_nonzero(get_peft_model(base, InitialStateConfig(**EXACT)), std=3.0)
    expected = model.generate(input_ids=prompts, num_beams=3, **GREEDY)
    assert torch.equal(plain.generate(prompts, cache_params=starting_cache(model, 6), num_beams=3, **GREEDY), expected)


def test_transformers_itself_starts_from_it_token_by_token(base, prompts, logits, make_nonzero, assert_close):
    plain = copy.deepcopy(base)
    ssmtune.unpatch(plain)
    model = make_nonzero(get_peft_model(base, InitialStateConfig(**EXACT)))
    cache = starting_cache(model, 2)
    steps = [logits(plain, prompts[:, t : t + 1], cache_params=cache, use_cache=True) for t in range(5)]
    assert_close("logits", logits(model, prompts), torch.cat(steps, dim=1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(base, tokenizer, dtype):
    base.to(dtype)
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = base(input_ids, use_cache=True).cache_params
    model = get_peft_model(base, InitialStateConfig(**EXACT))
    initial_state_from_text(model, tokenizer, TEXT)
    actual = starting_cache(model, 3)
    for index in range(2):
        for row in range(3):
            assert torch.equal(actual.get_recurrent_state(index)[row], expected.get_recurrent_state(index)[0])
            assert torch.equal(actual.get_conv_state(index)[row, :, 1:], expected.get_conv_state(index)[0, :, 1:])
        assert actual.get_conv_state(index).dtype == dtype


def test_sums_and_disabled_adapters(base, make_nonzero):
    model = make_nonzero(get_peft_model(base, InitialStateConfig()))
    model.add_adapter("other", InitialStateConfig(rank=2))
    model.base_model.set_adapter(["default", "other"])
    make_nonzero(model)
    layer = next(m for m in model.modules() if isinstance(m, InitialStateLayer))
    expected = layer.value("h", "default") + layer.value("h", "other")
    assert torch.equal(starting_cache(model).get_recurrent_state(0)[0], expected)
    with model.disable_adapter():
        assert not starting_cache(model).get_recurrent_state(0).any()


def test_a_model_without_initial_states_has_no_starting_cache(base):
    with pytest.raises(ValueError, match="has no adapter of Initial State Tuning"):
        starting_cache(get_peft_model(base, StateOffsetConfig()))


def tiny_family(name):
    """A random model of another architecture, and what it calls its cache."""
    shared = dict(vocab_size=64, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    hybrid = dict(intermediate_size=64, num_attention_heads=4, mamba_d_state=8, mamba_dt_rank=4, attn_layer_offset=1)
    if name == "falcon-mamba":
        config = FalconMambaConfig(**shared, state_size=8, num_hidden_layers=2)
    elif name == "jamba":
        config = JambaConfig(
            **shared, **hybrid, num_hidden_layers=3, num_key_value_heads=2, attn_layer_period=3, num_experts=1
        )
    else:
        config = ZambaConfig(
            **shared, **hybrid, num_hidden_layers=8, num_key_value_heads=4, attn_layer_period=2, n_mamba_heads=2
        )
    return AutoModelForCausalLM.from_config(config).eval(), "cache_params" if "falcon" in name else "past_key_values"


@pytest.mark.parametrize("family", ["falcon-mamba", "jamba", "zamba"])
def test_other_families(family, logits, make_nonzero, assert_close):
    base, cache_name = tiny_family(family)
    ssmtune.patch(base)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, InitialStateConfig(**EXACT))
    prompts = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[5, 9, 23, 41, 7, 7, 30]])
    initial_state_from_text(model, lambda text: {"input_ids": [5, 9, 23, 41, 7, 7, 30]}, TEXT)
    if family == "falcon-mamba":
        expected = logits(plain, torch.cat([text.expand(2, -1), prompts], dim=1))[:, 7:]
        assert_close("logits", expected, logits(model, prompts), 1e-5)
    make_nonzero(model, std=3.0)
    expected = logits(model, prompts)
    assert (logits(plain, prompts) - expected).abs().max() > 1e-2
    actual = logits(plain, prompts, use_cache=True, **{cache_name: starting_cache(model, 2)})
    assert_close("logits", expected, actual, 1e-5)
    generated = plain.generate(prompts, **{cache_name: starting_cache(model, 2)}, **GREEDY)
    assert torch.equal(generated, model.generate(input_ids=prompts, **GREEDY))


def test_left_padded_prompts_start_from_a_cache(base, prompts, make_nonzero):
    plain = copy.deepcopy(base)
    model = make_nonzero(get_peft_model(base, InitialStateConfig(task_type="CAUSAL_LM")), std=3.0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    prompts = prompts * mask
    expected = model.generate(input_ids=prompts, attention_mask=mask, **GREEDY)
    cache = starting_cache(model, 2)
    assert torch.equal(plain.generate(prompts, attention_mask=mask, cache_params=cache, **GREEDY), expected)
    alone = model.generate(input_ids=prompts[1:, 2:], **GREEDY)
    assert torch.equal(expected[1, 2:], alone[0])


def test_a_starting_cache_is_that_of_evaluation_mode(base, make_nonzero):
    model = make_nonzero(get_peft_model(base, InitialStateConfig(inference_scale=0.5))).train()
    state = base.backbone.layers[0].mixer.start_adapter.initial_state_h["default"]
    assert torch.equal(starting_cache(model).layers[0].recurrent_states[0][0], 0.5 * state)
    assert model.training and base.backbone.layers[0].mixer.start_adapter.training


def test_caches_are_for_models_of_transformers(base, tokenizer):
    model = get_peft_model(base, InitialStateConfig())
    with pytest.raises(ValueError, match="no model of transformers"):
        starting_cache(model.base_model.model.backbone.layers)

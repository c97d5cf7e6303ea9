import inspect

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import ssmtune
from ssmtune.likelihood import innermost
from ssmtune.mixers import patch
from ssmtune.mixers.continuation import fork_cache
from ssmtune.prompt_tuning import add_prefix, add_prompt

KINDS = ("initial_state", "state_offset", "output_offset", "conv_state")
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TRANSFORMERS = {
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
}


@pytest.fixture
def make_transformer():
    """A factory of random transformers."""

    def make(kind, attention="sdpa", **changes):
        model_class, config_class, more = TRANSFORMERS[kind]
        torch.manual_seed(0)
        model = model_class(config_class(**TINY | more | changes, attn_implementation=attention))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


def draw(batch=2, prompt=9, n=3, length=4, pads=0):
    """Prompts, continuations and a mask: the first row of prompts begins with pads."""
    generator = torch.Generator().manual_seed(prompt)
    prompts = torch.randint(3, 64, (batch, prompt), generator=generator)
    continuations = torch.randint(3, 64, (batch, n, length), generator=generator)
    mask = torch.ones_like(prompts)
    mask[0, :pads] = 0
    return prompts.masked_fill(mask == 0, 0), continuations, mask


def repeated(model, prompts, continuations, mask):
    """The logits of every prompt in front of each of its continuations."""
    n, length = continuations.shape[1:]
    rows = torch.cat([prompts.repeat_interleave(n, 0), continuations.flatten(0, 1)], dim=1)
    mask = torch.cat([mask.repeat_interleave(n, 0), torch.ones_like(rows[:, :length])], dim=1)
    inputs = {"attention_mask": mask} if not mask.all() else {}
    if "position_ids" in inspect.signature(innermost(model).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=rows, use_cache=False, **inputs).logits[:, -length - 1 : -1]
    return logits.unflatten(0, continuations.shape[:2])


def gradients(model, logits):
    model.zero_grad()
    # Of both signs and of another size at every token.
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check(model, batch, assert_close, ratio=1e-5):
    expected = repeated(model, *batch)
    actual = ssmtune.shared_prefix_logits(model, *batch)
    assert_close("logits", expected, actual, ratio)
    expected, actual = gradients(model, expected), gradients(model, actual)
    assert expected.keys() == actual.keys() and expected
    for name, gradient in expected.items():
        assert_close(name, gradient, actual[name], ratio)


# The norms of transformers are in float32, whatever the model.
INNER_FLOAT32 = 1e-6
# Shorter than the convolution looks back among them, and a continuation of which no token is run.
SIZES = [{"pads": 4}, {"prompt": 1, "length": 2}, {"prompt": 2, "n": 1, "length": 5}, {"length": 1, "batch": 1}]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()))
@pytest.mark.parametrize("family", ["mamba", "mamba2", "zamba", "bamba", "falcon_h1"])
def test_shared_prefix_logits_are_those_of_repeated_prompts(make_pair, adapt, assert_close, family, sizes):
    _, ours = make_pair(family)
    ours.double()
    adapt(ours, *KINDS)
    with ssmtune.backend("reference"):
        check(ours, draw(**sizes), assert_close, INNER_FLOAT32)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba2", "nemotron_h", "granitemoehybrid"])
def test_on_the_kernels(make_pair, adapt, assert_close, family):
    _, ours = make_pair(family)
    adapt(ours, *KINDS)
    check(ours.train(), draw(pads=3), assert_close)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["fork", "block-mask"])
def test_transformers(make_transformer, assert_close, kind, attention, sizes, checkpoints):
    model = make_transformer(kind, attention)
    if checkpoints:
        # It drops the cache, and what replaces it is one row under a block mask.
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if attention == "eager":
        check(model, draw(**sizes), assert_close)
    else:
        check(model.double(), draw(**sizes), assert_close, INNER_FLOAT32 if kind == "llama" else 1e-12)


@pytest.mark.parametrize("kind", ["mamba", "gpt_neox"])
def test_under_lora(make_family, make_transformer, assert_close, kind):
    peft = pytest.importorskip("peft")
    base = make_transformer(kind) if kind in TRANSFORMERS else make_family(kind)
    target = "query_key_value" if kind in TRANSFORMERS else r".*mixer\.in_proj"
    config = peft.LoraConfig(r=2, target_modules=[target] if kind in TRANSFORMERS else target, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    if kind == "mamba":
        patch(model)
    check(model, draw(pads=2), assert_close)


@pytest.mark.parametrize("kind, add", [("mamba", add_prompt), ("llama", add_prompt), ("llama", add_prefix)])
def test_virtual_tokens_come_before_the_prompt_alone(make_family, make_transformer, assert_close, kind, add):
    base = make_transformer(kind) if kind in TRANSFORMERS else make_family(kind)
    if kind == "mamba":
        patch(base)
    model = add(base, 3) if add is add_prompt else add(base, 3, None)
    check(model.eval(), draw(pads=2), assert_close)


def test_a_fork_leaves_the_cache_as_it_is(make_pair, tokens, assert_close):
    _, ours = make_pair("jamba")
    with torch.no_grad():
        cache = ours(tokens(2, 5), use_cache=True).past_key_values
        held = [dict(vars(layer)) for layer in cache.layers]
        states = [t.clone() for layer in cache.layers for t in getattr(layer, "recurrent_states", {}).values()]
        first = ours(tokens(4, 3), past_key_values=fork_cache(cache, 2), use_cache=True).logits
        again = ours(tokens(4, 3), past_key_values=fork_cache(cache, 2), use_cache=True).logits
        ours(tokens(4, 1), past_key_values=fork_cache(cache, 2), use_cache=True)
    assert torch.equal(first, again)
    after = [t for layer in cache.layers for t in getattr(layer, "recurrent_states", {}).values()]
    assert states and all(map(torch.equal, states, after))
    assert all(layer.keys is was["keys"] for layer, was in zip(cache.layers, held, strict=True) if "keys" in was)


def test_refuses_what_would_be_wrong(make_pair, make_family, make_transformer):
    prompts, continuations, mask = draw(pads=2)
    with pytest.raises(ValueError, match="got prompts to share, but .* is not patched"):
        ssmtune.shared_prefix_logits(make_family("mamba"), prompts, continuations)
    _, ours = make_pair()
    with pytest.raises(ValueError, match="ends with a pad"):
        ssmtune.shared_prefix_logits(ours, prompts, continuations, mask.flip(1))
    with pytest.raises(ValueError, match="expected \\(batch, prompt\\) and \\(batch, n, length\\)"):
        ssmtune.shared_prefix_logits(ours, prompts, continuations[:1])
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        ssmtune.shared_prefix_logits(ours, prompts, continuations)
    windowed = make_transformer("llama").train()
    windowed.gradient_checkpointing_enable({"use_reentrant": False})
    windowed.config.sliding_window = 6
    with pytest.raises(ValueError, match="sees 6 tokens back"):
        ssmtune.shared_prefix_logits(windowed, prompts, continuations)


def test_refuses_virtual_tokens_that_peft_would_repeat(make_pair):
    peft = pytest.importorskip("peft")
    _, ours = make_pair()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_attention_heads=1)
    with pytest.raises(ValueError, match="PROMPT_TUNING of peft"):
        ssmtune.shared_prefix_logits(peft.get_peft_model(ours, config), *draw())

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from ssmtune.data import IGNORED
from ssmtune.generation import generate_texts, target_log_likelihood
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.prompt_tuning import VirtualTokenModel, repair
from ssmtune.stored_adapters import load_adapter
from ssmtune.weights import save_weights

PROMPTS = ["the sea is blue", "x", "the sun and the sea are not the same thing"]


@pytest.fixture
def model(tiny_checkpoint):
    model = apply_method(load_model(tiny_checkpoint)[0], "prompt-tuning", {"virtual_tokens": 5}, seed=1)
    with torch.no_grad():
        # a random model repeats one token whatever comes before; large weights make it depend on its past
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return load_model(tiny_checkpoint)[1]


def greedy(model, prompt_embeddings, embed, tokens, count):
    """Greedy decoding by running the base on the whole sequence for every token."""
    new = []
    for _ in range(count):
        embeddings = torch.cat([prompt_embeddings, embed(torch.tensor([tokens + new]))], dim=1)
        new.append(int(model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax()))
    return new


def generate(model, tokens, count, **options):
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    return output[0, tokens.shape[1] :].tolist()


@torch.no_grad()
def test_generation_sees_the_prompt_once(model, tokenizer):
    for text in PROMPTS:
        tokens = tokenizer(text)["input_ids"]
        base = model.base_model
        expected = greedy(base, model.get_prompt(1), base.get_input_embeddings(), tokens, 12)
        assert len(set(expected)) > 2
        assert generate(model, torch.tensor([tokens]), 12) == expected
        assert generate(model, torch.tensor([tokens]), 12, use_cache=False) == expected


def test_left_padding_changes_nothing(model, tokenizer):
    together = generate_texts(model, tokenizer, PROMPTS, 10)
    assert together == [generate_texts(model, tokenizer, [prompt], 10)[0] for prompt in PROMPTS]


@torch.no_grad()
def test_the_prompt_goes_between_pads_and_text(model, assert_close):
    tokens = torch.randint(0, 250, (1, 6))
    alone = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    labels = torch.where(mask.bool(), padded, IGNORED)
    output = model(input_ids=padded, attention_mask=mask, labels=labels)
    assert_close("logits", alone[:, -6:], output.logits[:, -6:], 1e-5)
    reference = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    assert_close("loss", reference.loss, output.loss, 1e-5)


@torch.no_grad()
def test_continuing_a_cache_does_not_repeat_the_prompt(model, assert_close):
    tokens = torch.randint(0, 250, (1, 7))
    expected = model(input_ids=tokens, use_cache=False).logits[:, -1]
    first = model(input_ids=tokens[:, :-1], use_cache=True)
    second = model(input_ids=tokens[:, -1:], cache_params=first.cache_params, use_cache=True)
    assert second.logits.shape[1] == 1
    assert_close("logits", expected, second.logits[:, -1], 1e-4)


@torch.no_grad()
def test_likelihood_leaves_the_virtual_tokens_out(model, tokenizer):
    score = target_log_likelihood(model, tokenizer, [PROMPTS[0], "a"], [" and red", " b"])[0]
    prompt, target = tokenizer(PROMPTS[0])["input_ids"], tokenizer(" and red")["input_ids"]
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, 5:].log_softmax(-1)
    expected = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
    assert score.tokens == len(target) and score.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_saved_prompt_loads_through_peft(model, tokenizer, tiny_checkpoint, tmp_path):
    base = load_model(tiny_checkpoint)[0]
    base.load_state_dict(model.base_model.state_dict())
    expected = generate_texts(model, tokenizer, PROMPTS, 10)
    save_weights(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    repaired = repair(PeftModel.from_pretrained(base, tmp_path))
    assert generate_texts(repaired, tokenizer, PROMPTS, 10) == expected
    base = load_model(tiny_checkpoint)[0]
    base.load_state_dict(model.base_model.state_dict())
    assert generate_texts(load_adapter(base, tmp_path), tokenizer, PROMPTS, 10) == expected


def test_without_the_repair_generation_is_wrong(tiny_checkpoint):
    # what this file guards against: when peft gets it right by itself, ssmtune.prompt_tuning can go
    base = load_model(tiny_checkpoint)[0]
    fed = []
    base.backbone.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_attention_heads=1)
    model = get_peft_model(base, config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    generate(model, tokens, 3)
    assert fed == [8, 6, 6]
    fed.clear()
    generate(repair(model), tokens, 3)
    assert fed == [8, 1, 1]


@torch.no_grad()
def test_disabled_prompt_is_the_base(model):
    tokens = torch.randint(0, 250, (2, 6))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, model.base_model(input_ids=tokens).logits)
        inside = generate(model, tokens[:1], 4)
    base = model.base_model.generate(
        input_ids=tokens[:1],
        attention_mask=torch.ones_like(tokens[:1]),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    assert inside == base[0, 6:].tolist()
    assert isinstance(model, VirtualTokenModel)


def test_other_models_are_left_alone(tiny_checkpoint):
    adapted = apply_method(load_model(tiny_checkpoint)[0], "lora")
    kind = type(adapted)
    assert type(repair(adapted)) is kind

import pytest
import torch

from ssmtune.generation import TargetScore, generate_texts, target_log_likelihood
from ssmtune.methods import METHODS, apply_method
from ssmtune.models import load_model

PROMPTS = ["the sea is blue", "x", "the sun and the sea are not the same thing"]


@pytest.fixture
def loaded(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint)
    with torch.no_grad():
        # a random model repeats one token whatever comes before; large weights make it depend on its past
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model, tokenizer


@torch.no_grad()
def test_greedy_text_is_that_of_whole_passes(loaded):
    model, tokenizer = loaded
    tokens = tokenizer(PROMPTS[0])["input_ids"]
    new = []
    for _ in range(12):
        new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
    assert len(set(new)) > 2
    assert generate_texts(model, tokenizer, [PROMPTS[0]], 12) == [tokenizer.decode(new)]
    assert generate_texts(model, tokenizer, [PROMPTS[0]], 12, use_cache=False) == [tokenizer.decode(new)]


@pytest.mark.parametrize("method", [None, *METHODS])
def test_texts_do_not_depend_on_the_batch(loaded, method):
    model, tokenizer = loaded
    if method is not None:
        model = apply_method(model, method)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    alone = [generate_texts(model, tokenizer, [prompt], 8)[0] for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, 8) == alone
    assert generate_texts(model, tokenizer, PROMPTS, 8, batch_size=2) == alone
    assert generate_texts(model, tokenizer, PROMPTS, 8, use_cache=False) == alone


def test_text_ends_at_the_end_of_text_token(loaded):
    model, tokenizer = loaded
    unlimited = generate_texts(model, tokenizer, [PROMPTS[0]], 12)[0]
    tokens = tokenizer(unlimited)["input_ids"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[3])
    assert generate_texts(model, tokenizer, [PROMPTS[0]], 12)[0] == tokenizer.decode(tokens[: tokens.index(tokens[3])])


def test_sampling_depends_on_its_seed_and_leaves_the_generator_alone(loaded):
    model, tokenizer = loaded
    state = torch.random.get_rng_state()
    texts = [generate_texts(model, tokenizer, [PROMPTS[0]], 12, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_generation_restores_the_training_mode(loaded):
    model, tokenizer = loaded
    model.train()
    generate_texts(model, tokenizer, ["a"], 1)
    target_log_likelihood(model, tokenizer, ["a"], ["b"])
    assert model.training


def test_empty_prompt_and_no_prompts(loaded):
    model, tokenizer = loaded
    assert len(generate_texts(model, tokenizer, [""], 2)) == 1
    assert generate_texts(model, tokenizer, []) == []
    assert target_log_likelihood(model, tokenizer, [], []) == []
    assert target_log_likelihood(model, tokenizer, ["a"], [""]) == [TargetScore(0.0, 0)]


@torch.no_grad()
@pytest.mark.parametrize("add_eos", [False, True])
def test_likelihood_is_the_sum_over_target_tokens(loaded, add_eos):
    model, tokenizer = loaded
    targets = [" and red", " is", " of gold"]
    scores = target_log_likelihood(model, tokenizer, PROMPTS, targets, batch_size=2, add_eos=add_eos)
    for prompt, target, score in zip(PROMPTS, targets, scores, strict=True):
        before, after = tokenizer(prompt)["input_ids"], tokenizer(target)["input_ids"]
        after += [tokenizer.eos_token_id] * add_eos
        logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        expected = sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after))
        assert score.tokens == len(after)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)

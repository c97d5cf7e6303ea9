import pytest
import torch
import torch.nn.functional as F

import ssmtune
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.prefix_sharing import continuation_log_likelihoods

ROWS = [{"prompt": f"the sea {'is ' * length}", "chosen": "blue", "rejected": "red and red"} for length in (1, 4, 2)]
ROWS.append({"prompt": "", "chosen": "the sun is red", "rejected": "blue"})


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return load_model(tiny_checkpoint)[1]


def adapted(checkpoint, method):
    return apply_method(load_model(checkpoint)[0], method)


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def log_likelihoods(model, tokenizer):
    """(rows, 2), each answer by a call of its own."""

    def alone(prompt, answer):
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        answer = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum")

    pairs = [alone(row["prompt"], row[name]) for row in ROWS for name in ("chosen", "rejected")]
    return torch.stack(pairs).view(-1, 2)


def test_preference_collator(tokenizer):
    batch = ssmtune.PreferenceCollator(tokenizer, max_prompt_length=4, max_answer_length=3)(ROWS)
    prompts, answers = batch["prompt_ids"], batch["continuation_ids"]
    assert prompts.shape == batch["prompt_mask"].shape == (4, 4)
    assert answers.shape == batch["continuation_mask"].shape == (4, 2, 3)
    assert batch["prompt_mask"][:, -1].all() and batch["continuation_mask"][..., 0].all()
    whole = tokenizer(ROWS[1]["prompt"], add_special_tokens=False)["input_ids"]
    assert prompts[1].tolist() == whole[-4:]
    chosen = [*tokenizer("blue", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert answers[0, 0][batch["continuation_mask"][0, 0] == 1].tolist() == chosen[:3]


@pytest.mark.parametrize(
    "row, match",
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' of a preference is missing"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "'prompt' of a preference holds a list"),
    ],
)
def test_other_columns_are_refused(tokenizer, row, match):
    with pytest.raises(ValueError, match=match):
        ssmtune.PreferenceCollator(tokenizer)([row])


@pytest.mark.parametrize("method", ["state-offset", "initial-state", "lora"])
def test_dpo_loss_is_that_of_repeated_prompts(tiny_checkpoint, tokenizer, assert_close, method):
    model, (base, _) = adapted(tiny_checkpoint, method), load_model(tiny_checkpoint)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        reference = log_likelihoods(base, tokenizer)
    gains = log_likelihoods(model, tokenizer) - reference
    margins = 0.3 * (gains[:, 0] - gains[:, 1])
    expected = -F.logsigmoid(margins).mean()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    batch = ssmtune.PreferenceCollator(tokenizer)(ROWS)
    for known in (None, base, reference):
        model.zero_grad()
        actual = ssmtune.dpo_loss(model.train(), batch, beta=0.3, reference=known)
        actual.loss.backward()
        assert_close("loss", expected, actual.loss, 1e-5)
        # Small differences of large sums.
        torch.testing.assert_close(actual.margins, margins.detach(), atol=1e-5, rtol=0)
        for name, parameter in trainable(model).items():
            assert_close(name, gradients[name], parameter.grad, 1e-5)
        assert model.training


@pytest.mark.parametrize("method", ["state-offset", "lora"])
def test_dpo_trains(tiny_checkpoint, tokenizer, method):
    model = adapted(tiny_checkpoint, method)
    batch = ssmtune.PreferenceCollator(tokenizer)(ROWS)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    steps = []
    for _ in range(12):
        steps.append(ssmtune.dpo_loss(model, batch))
        steps[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Where it starts the model is its reference.
    assert steps[0].margins.abs().max() < 1e-6
    assert steps[-1].loss < 0.9 * steps[0].loss
    assert (steps[-1].margins > 0).all()


def test_a_model_without_adapters_needs_a_reference(tiny_checkpoint, tokenizer):
    model, _ = load_model(tiny_checkpoint)
    batch = ssmtune.PreferenceCollator(tokenizer)(ROWS)
    with pytest.raises(ValueError, match="got no reference, and MambaForCausalLM has no adapters"):
        ssmtune.dpo_loss(model, batch)
    with torch.no_grad():
        reference = continuation_log_likelihoods(model, batch)
    assert ssmtune.dpo_loss(model, batch, reference=reference).loss.item() == pytest.approx(0.6931, abs=1e-4)

import copy
import math

import numpy as np
import pytest
import torch

from ssmtune.config import ConfigError
from ssmtune.data import Example
from ssmtune.effects import EFFECTS, measure_effects
from ssmtune.effects.context import Context, read_text
from ssmtune.effects.decoding import decoding_milliseconds
from ssmtune.effects.ood import auroc, fpr95
from ssmtune.methods import METHODS, apply_method
from ssmtune.models import load_model
from ssmtune.tasks.choice import ChoiceTask
from ssmtune.tasks.continuation import ContinuationTask

TEXT = "The sea is blue and the sun is red, and the land between them is green. " + " ".join(map(str, range(90)))


def examples(*prompts):
    return [Example(prompt, "red") for prompt in prompts]


PROMPTS = examples("What is the sun? Say:", "What is a fire engine? Say:", "What is grass, the tall one? Say:")
CHOICE = ChoiceTask("made up", "accuracy", True, PROMPTS, PROMPTS, PROMPTS, choices=("red", "blue"), max_length=24)


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.fixture
def context(base):
    return Context(CHOICE, *base, TEXT)


def moved(model, scale):
    """A copy with other weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))
    return model


def losses(model, tokens):
    """-log p of each token but the first, by definition."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    return -logits[:-1].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]


def test_forgetting_is_the_rise_of_the_loss(base, context):
    other = moved(base[0], 0.05)
    found = measure_effects(other, context, ["forgetting"])["forgetting"]
    # shorter than one window of 512 tokens
    rise = losses(other, context.tokens).mean() - losses(base[0], context.tokens).mean()
    assert len(context.tokens) < 512 and found["nats_per_token"] == pytest.approx(rise.item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(found["base_perplexity"] * math.exp(rise), rel=1e-4)
    assert measure_effects(base[0], context, ["forgetting"])["forgetting"]["nats_per_token"] == 0
    assert measure_effects(base[0], Context(CHOICE, *base, ""), ["forgetting"]) == {"forgetting": None}


def test_length_scores_the_same_tokens_after_longer_texts(base, context):
    found = measure_effects(base[0], context, ["length"])["length"]
    assert found["training_length"] == 24
    for times in (1, 2, 4):
        ends = range(96, len(context.tokens) + 1, 96)
        windows = [context.tokens[end - 24 * times : end] for end in ends]
        expected = torch.stack([losses(base[0], window)[-23:] for window in windows]).mean().exp().item()
        assert found["perplexity"][f"{times}x"] == pytest.approx(expected, rel=1e-4)
    short = Context(CHOICE, *base, TEXT[:40])
    assert len(short.tokens) < 96 and measure_effects(base[0], short, ["length"]) == {"length": None}


def test_ood_scores_are_those_of_the_choices_alone(base, context):
    model, tokenizer = base
    found = measure_effects(model, context, ["ood"])["ood"]
    red, blue = (tokenizer(choice)["input_ids"][0] for choice in CHOICE.choices)
    scores = {"softmax": [], "energy": []}
    for prompts in (context.inside, context.outside):
        with torch.no_grad():
            rows = [model(torch.tensor([tokenizer(prompt)["input_ids"][-24:]])).logits[0, -1] for prompt in prompts]
        z = torch.stack(rows).double()[:, [red, blue]]
        scores["softmax"].append((z.exp() / z.exp().sum(1, keepdim=True)).amax(1).numpy())
        scores["energy"].append(z.exp().sum(1).log().numpy())
    for name, (inside, outside) in scores.items():
        assert found[name] == pytest.approx({"auroc": auroc(inside, outside), "fpr95": fpr95(inside, outside)})
    continued = ContinuationTask("made up", "perplexity", False, PROMPTS, PROMPTS, PROMPTS)
    assert measure_effects(model, Context(continued, *base, TEXT), ["ood"]) == {"ood": None}


def test_other_inputs_have_the_frame_of_the_tasks_prompts(base, context):
    assert context.outside[:2] == ["What is The sea is? Say:", "What is blue and the? Say:"]
    other = ChoiceTask("another", "accuracy", True, PROMPTS, PROMPTS, examples("Quite another"), choices=(" a",))
    another = Context(CHOICE, *base, TEXT, other)
    assert another.outside == ["Quite another"] and another.fingerprint() != context.fingerprint()
    assert Context(CHOICE, *base, TEXT + "!").fingerprint() != context.fingerprint()


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_fpr95_are_those_of_their_definitions(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 61), rng.normal(0, 1, 47)
    if ties:
        inside, outside = inside.round(), outside.round()
    wins = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(100 * np.mean(wins))
    thresholds = [t for t in np.unique(inside) if np.mean(inside >= t) >= 0.95]
    assert fpr95(inside, outside) == pytest.approx(100 * np.mean(outside >= max(thresholds)))
    assert (auroc(inside, inside - 100), fpr95(inside, inside - 100)) == (100, 0)
    assert (auroc(inside, inside), fpr95(inside, inside + 100)) == (50, 100)


def test_auroc_and_fpr95_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 61).round(1), rng.normal(0, 1, 47).round(1)
    labels, scores = np.repeat([1, 0], [61, 47]), np.concatenate([inside, outside])
    assert auroc(inside, outside) == pytest.approx(100 * metrics.roc_auc_score(labels, scores))
    false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert fpr95(inside, outside) == pytest.approx(100 * false[true >= 0.95].min())


HOW = {"lora": "set_adapter", "state-offset": "set_adapter", "prompt-tuning": "set_adapter", "full": "copied"}
HOW |= {"bitfit": "copied", "lora+state-offset": "copied"}


@pytest.mark.parametrize("method", HOW)
def test_switching_comes_back_to_the_trained_adapter(base, context, method):
    model = apply_method(copy.deepcopy(base[0]), method, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 if parameter.requires_grad else 0)
    tokens = torch.tensor([context.tokens[:20]])
    before = model.eval()(tokens).logits
    found = measure_effects(model, context, ["switching"])["switching"]
    assert found["how"] == HOW[method] and found["ms"] > 0
    assert torch.equal(model.eval()(tokens).logits, before)
    assert measure_effects(base[0], context, ["switching"]) == {"switching": None}


def test_every_method_can_be_measured(base, context):
    for method in METHODS:
        found = measure_effects(apply_method(copy.deepcopy(base[0]), method, seed=0), context, list(EFFECTS))
        assert list(found) == list(EFFECTS) and None not in found.values(), method
        assert math.isfinite(found["forgetting"]["nats_per_token"])


def test_decoding_time_is_of_a_token(base):
    assert 0 < decoding_milliseconds(*base, "The sea", tokens=4) < 10_000


def test_held_out_text_is_read_from_plain_files_and_jsonl(tmp_path):
    assert len(read_text(None).split()) > 1500
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("One.\n\nTwo.")
    rows.write_text('{"id": 1, "text": "One."}\n{"text": "Two."}\n')
    assert read_text(str(plain)) == read_text(str(rows)) == "One.\n\nTwo."
    with pytest.raises(ConfigError, match="--text .*nowhere.txt does not exist"):
        read_text(str(tmp_path / "nowhere.txt"))

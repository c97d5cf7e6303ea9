import pytest

from ssmtune.data import Example
from ssmtune.tasks.choice import ChoiceTask, first_token_logits

# The first three begin alike, and one is the beginning of another.
CHOICES = (" import", " importlib", " imp", " xml", " 7")


@pytest.fixture
def task():
    words = "a bee sea deep eel".split()
    examples = [Example(prompt=f"{word} " * n + "is", target=" xml") for n, word in enumerate(words, 1)]
    return ChoiceTask("toy", "accuracy", True, train=[], dev=[], test=examples, choices=CHOICES)


def test_predict_equals_scoring_every_choice(task, byte_model, byte_tokenizer):
    from ssmtune.generation import target_log_likelihood

    prompts = [example.prompt for example in task.test]
    table = []
    for choice in CHOICES:
        scores = target_log_likelihood(byte_model, byte_tokenizer, prompts, [choice] * len(prompts), add_eos=True)
        table.append([score.log_likelihood for score in scores])
    expected = [CHOICES[max(range(len(CHOICES)), key=lambda c: table[c][i])] for i in range(len(prompts))]  # noqa: B023
    assert task.predict(byte_model, byte_tokenizer, prompts, batch_size=2) == expected
    assert task.predict(byte_model, byte_tokenizer, prompts, batch_size=32) == expected


def test_first_token_logits_are_those_of_each_prompt_alone(task, byte_model, byte_tokenizer):
    prompts = [example.prompt for example in task.test]
    logits, log_total = first_token_logits(byte_model, byte_tokenizer, prompts, CHOICES, task.max_length, batch_size=3)
    for row, prompt in zip(logits - log_total[:, None], prompts, strict=True):
        alone = byte_model(**byte_tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        first = [byte_tokenizer(choice)["input_ids"][0] for choice in CHOICES]
        assert row.tolist() == pytest.approx(alone[first].tolist(), abs=1e-4)


def test_evaluate_is_percent_correct(task, byte_model, byte_tokenizer, monkeypatch):
    answers = [" xml", " imp", " xml", " xml", " 7"]
    monkeypatch.setattr(ChoiceTask, "predict", lambda *args: answers)
    assert task.evaluate(byte_model, byte_tokenizer, task.test) == {"accuracy": pytest.approx(60.0)}

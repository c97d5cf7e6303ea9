import pytest

from ssmtune.data import Example
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.labels import LabelTask, NumberTask


def label_task(truths, groups=None, **options):
    groups = groups or [""] * len(truths)
    examples = [Example("?", f" {truth}", group=group) for truth, group in zip(truths, groups, strict=True)]
    return LabelTask("toy", "accuracy", True, train=[], dev=[], test=examples, **options)


def test_no_label_is_invalid_and_wrong_in_every_metric():
    task = label_task(["yes", "yes", "no", "no"], labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))
    scores = task.score(["yes", "maybe", "", "no"], task.test)
    # as if the two had been answered the other way round
    wrong = task.score(["yes", "no", "yes", "no"], task.test)
    assert scores.pop("invalid") == 2 and wrong.pop("invalid") == 0
    assert scores == wrong == {"accuracy": 50.0, "f1": 50.0, "matthews": 0.0}


def test_groups_are_scored_apart():
    task = label_task(["a", "b", "c", "a"], ["m", "m", "mm", "mm"], labels=("a", "b", "c"))
    assert task.score(["a", "c", "c", "a"], task.test) == {
        "accuracy": 75.0,
        "accuracy_m": 50.0,
        "accuracy_mm": 100.0,
        "invalid": 0.0,
    }


def test_a_number_off_the_scale_is_invalid_and_as_wrong_as_can_be():
    examples = [Example("?", f" {score:.1f}", (str(score),)) for score in (0.25, 2.0, 4.75, 5.0)]
    task = NumberTask("toy", "pearson", True, train=[], dev=[], test=examples, scale=(0.0, 5.0))
    right = task.score(["0.25", "2.0", "4.75", "5"], examples)
    assert right == {"pearson": pytest.approx(100), "spearman": pytest.approx(100), "invalid": 0}
    for text in ("alike", "", "5.1", "-1", "nan", "inf"):
        scores = task.score(["0.25", "2.0", text, "5"], examples)
        farthest = task.score(["0.25", "2.0", "0", "5"], examples)
        assert scores == farthest | {"invalid": 1.0}
        assert scores["pearson"] < 90
        scores = task.score([text, "2.0", "4.75", "5"], examples)
        assert scores == task.score(["5", "2.0", "4.75", "5"], examples) | {"invalid": 1.0}


def test_evaluate_reads_one_line_that_the_model_writes(byte_model, byte_tokenizer, monkeypatch):
    task = label_task(["yes", "no", "yes"], labels=("no", "yes"))
    said = [" yes\nNext: no", " no", " yes indeed"]
    monkeypatch.setattr("ssmtune.generation.generate_texts", lambda *args, **options: said)
    assert task.evaluate(byte_model, byte_tokenizer, task.test) == {"accuracy": pytest.approx(200 / 3), "invalid": 1.0}


def test_evaluate_of_an_untuned_model_counts_its_babble(byte_model, byte_tokenizer):
    task = label_task(["yes", "no", "yes"], labels=("no", "yes"))
    text = GenerationTask.answers(task, byte_model, byte_tokenizer, task.test)
    assert not set(text) & {"yes", "no"}
    assert task.evaluate(byte_model, byte_tokenizer, task.test) == {"accuracy": 0.0, "invalid": 3.0}

import math
from types import SimpleNamespace

import numpy as np
import pytest

from ssmtune.data import Example
from ssmtune.generation import TargetScore
from ssmtune.tasks import terms as of
from ssmtune.tasks.choice import ChoiceTask
from ssmtune.tasks.continuation import ContinuationTask
from ssmtune.tasks.generation import GenerationTask, SummaryTask
from ssmtune.tasks.labels import LabelTask, NumberTask
from ssmtune.tasks.terms import Terms

EMPTY = {"train": [], "dev": [], "test": []}


def task(kind, metric, **options):
    return kind(name="made up", metric=metric, higher_is_better=metric != "perplexity", **EMPTY, **options)


def examples(*targets):
    return [Example("prompt", target, references=(target.strip(),)) for target in targets]


LABELS = {"labels": ("no", "yes"), "metrics": ("matthews",)}
TEXTS = [" a mill by the river", " the old mill sells cheap bread", " it is near the river", " nothing else to say"]
CASES = {
    "accuracy": (task(ChoiceTask, "accuracy", choices=(" a", " b")), [" a", " b", " b"], examples(" a", " a", " b")),
    "perplexity": (
        task(ContinuationTask, "perplexity"),
        [TargetScore(-3.5, 2), TargetScore(-1.25, 1), TargetScore(-20.0, 7)],
        examples(" x", " y", " z"),
    ),
    "bleu": (
        task(GenerationTask, "bleu"),
        ["a mill by the river", "the mill sells bread", "it is by the river", "there is more"],
        examples(*TEXTS),
    ),
    "bleu without 4-grams": (
        task(GenerationTask, "bleu"),
        ["mill a river by the", "bread cheap mill the", "near it river is the", "say to else"],
        examples(*TEXTS),
    ),
    "rouge_1": (task(SummaryTask, "rouge_1"), ["a mill", "bread is cheap", "it", "say nothing"], examples(*TEXTS)),
    "matthews": (
        task(LabelTask, "matthews", **LABELS),
        ["yes", "no", "perhaps", "yes", "no"],
        examples(" yes", " no", " yes", " no", " no"),
    ),
    "pearson": (
        task(NumberTask, "pearson", scale=(0.0, 5.0)),
        ["1.0", "4.5", "none", "2.0"],
        examples(" 1.2", " 5.0", " 4.0", " 0.4"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_metric_is_a_function_of_the_sums(name):
    made_up, answers, wanted = CASES[name]
    terms = made_up.terms(answers, wanted)
    assert len(terms.rows) == len(answers)
    again = Terms.unpacked(terms.packed())
    # with every example once, and with some twice and others not at all, as a draw has them
    for chosen in (range(len(answers)), [0, 0, *range(2, len(answers))]):
        score = made_up.score([answers[i] for i in chosen], [wanted[i] for i in chosen])[made_up.metric]
        assert again.metric(again.rows[list(chosen)].sum(0)) == pytest.approx(score, rel=1e-5)
    both = np.stack([again.rows.sum(0), again.rows[:1].sum(0)])
    assert again.metric(both).shape == (2,)


def test_metrics_that_are_no_sums_have_no_terms():
    made_up, answers, wanted = CASES["pearson"]
    assert task(NumberTask, "spearman", scale=(0.0, 5.0)).terms(answers, wanted) is None


def test_sums_without_a_metric_are_not_a_surprise():
    assert Terms("bleu", np.zeros((1, 10))).metric(np.zeros(10)) == 0
    assert Terms("pearson", np.zeros((1, 6))).metric(np.array([2.0, 2, 1, 2, 0.5, 1])) == 0
    assert math.isinf(Terms("perplexity", np.zeros((1, 2))).metric(np.array([2000.0, 1.0])))


def test_thousands_of_examples_are_a_few_kilobytes():
    right = np.random.default_rng(0).integers(0, 2, 5000) * 100.0
    assert len(of.mean_terms(right).packed()["data"]) < 3000
    assert SimpleNamespace(**of.mean_terms(right).packed()).terms == 2

import math
import random

import pytest

from ssmtune.tasks import agreement

ANSWERS = ["yes", "no", "no", "yes", "yes", "no", "no", "yes"]
TRUTHS = ["yes", "yes", "no", "no", "yes", "no", "yes", "yes"]


def test_scores_of_labels_by_hand():
    # tp 3, fp 1, fn 2, tn 2
    assert agreement.accuracy(ANSWERS, TRUTHS) == 5 / 8
    assert agreement.f1(ANSWERS, TRUTHS, "yes") == pytest.approx(6 / 9)
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert agreement.matthews(ANSWERS, TRUTHS, "yes") == pytest.approx(expected)


def test_correlations_by_hand():
    assert agreement.pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / math.sqrt(2 * 38 / 3))
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert agreement.spearman([0, 5, 5, 9], [1, 10, 100, 1000]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_what_is_undefined_is_zero():
    assert agreement.matthews(["no"] * 8, TRUTHS, "yes") == 0
    assert agreement.f1(["no"] * 3, ["no"] * 3, "yes") == 0
    assert agreement.pearson([0.1] * 3, [1, 2, 3]) == 0
    assert agreement.spearman([], []) == 0


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(seed)
    answers, truths = ([draw.choice(["no", "yes"]) for _ in range(50)] for _ in range(2))
    assert agreement.accuracy(answers, truths) == pytest.approx(metrics.accuracy_score(truths, answers))
    assert agreement.f1(answers, truths, "yes") == pytest.approx(metrics.f1_score(truths, answers, pos_label="yes"))
    assert agreement.matthews(answers, truths, "yes") == pytest.approx(metrics.matthews_corrcoef(truths, answers))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed):
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(seed)
    # few values, so that there are ties
    answers, truths = ([draw.randrange(12) / 4 for _ in range(40)] for _ in range(2))
    assert agreement.pearson(answers, truths) == pytest.approx(stats.pearsonr(answers, truths).statistic)
    assert agreement.spearman(answers, truths) == pytest.approx(stats.spearmanr(answers, truths).statistic)

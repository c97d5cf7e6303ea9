import pytest

from ssmtune.ranks import average_ranks, critical_difference
from ssmtune.summary import summarize


def test_ranks_are_averaged_and_ties_shared():
    scores = {
        "first": {"a": 3.0, "b": 2.0, "c": 2.0, "only here": 9.0},
        "second": {"a": 1.0, "b": 5.0, "c": 4.0},
    }
    ranks = average_ranks(scores)
    assert ranks.mean == {"b": 1.75, "a": 2.0, "c": 2.25} and list(ranks.mean) == ["b", "a", "c"]
    assert ranks.tasks == 2 and ranks.critical_difference is None
    assert average_ranks({}).mean == {}


# Table 5(a) of Demšar, JMLR 2006
@pytest.mark.parametrize("methods, q", [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_critical_difference_is_that_of_the_table(methods, q):
    assert critical_difference(methods, 14) == pytest.approx(
        q * (methods * (methods + 1) / (6 * 14)) ** 0.5, abs=1.5e-3
    )


def test_enough_tasks_have_a_critical_difference():
    scores = {f"task {i}": {"a": 2.0, "b": 1.0} for i in range(6)}
    assert average_ranks(scores).critical_difference == pytest.approx(1.960 / 6**0.5, abs=1e-3)


def test_a_summary_ranks_by_the_direction_of_its_metric(fake):
    out = fake({"lora": [20, 22], "full": [18, 19]}, metric="perplexity", higher=False)
    assert summarize(out).ranks.mean == {"full": 1, "lora": 2}

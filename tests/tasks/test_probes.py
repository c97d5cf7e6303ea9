import subprocess
import sys

import pytest

from ssmtune.tasks import load_task
from ssmtune.tasks.probes import PROBES, WORDS, sorting_examples


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name) for name in PROBES}


def given(example):
    """What stands between the first word of a prompt and its colon."""
    _, *words, colon = example.prompt.split()
    assert colon == ":"
    return words


def test_answers_are_right(tasks):
    for example in tasks["probe-recall"].test:
        words = given(example)
        pairs = sorted(zip(words[::2], words[1::2], strict=True))
        assert example.target.split() == [word for pair in pairs for word in pair]
        assert len(dict(pairs)) == len(pairs) and example.group == f"{len(pairs)}_pairs"
    assert {example.group for example in tasks["probe-recall"].test} == {"3_pairs", "10_pairs"}
    for example in tasks["probe-copy"].test:
        assert example.target.split() == given(example) and len(given(example)) == 16
    for example in tasks["probe-style"].test:
        assert example.target.split() == sorted(map(str.upper, given(example)))
    for example in tasks["probe-order"].test:
        assert example.target.split()[::-1] == sorted(given(example))


def test_swaps_are_those_of_a_permutation_matrix(tasks):
    import numpy as np

    for example in tasks["probe-swaps"].test:
        product = np.eye(5, dtype=int)
        for i, j in given(example):
            matrix = np.eye(5, dtype=int)
            matrix[[int(i) - 1, int(j) - 1]] = matrix[[int(j) - 1, int(i) - 1]]
            product = matrix @ product
        letters = np.array(list("abcde"))[product.argmax(1)]
        assert example.target.split() == [word for pair in zip("12345", letters, strict=True) for word in pair]
        assert example.group == f"{len(given(example))}_swaps"
    assert {len(given(example)) for example in tasks["probe-swaps"].test} == {2, 3, 4, 16}


@pytest.mark.parametrize("name", PROBES)
def test_examples_are_the_same_anywhere_and_splits_apart(name, tasks):
    task = tasks[name]
    prompts = {split: {example.prompt for example in getattr(task, split)} for split in ("train", "dev", "test")}
    assert not prompts["train"] & (prompts["dev"] | prompts["test"]) and not prompts["dev"] & prompts["test"]
    words = {word for example in task.train[:500] for word in (example.prompt + example.target).split()}
    assert words <= set(WORDS)
    longest = max(len((example.prompt + example.target).split()) for example in task.train) + 1
    assert longest <= task.max_length
    assert max(len(example.target.split()) for example in task.train) < task.max_new_tokens
    # strings seed a Random by their bytes: another process draws the same
    code = f"from ssmtune.tasks import load_task; print(load_task({name!r}).fingerprint())"
    if name == "probe-copy":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == task.fingerprint()


def test_score_counts_whole_answers_and_words_in_their_place(tasks):
    task = tasks["probe-order"]
    examples = task.test[:4]
    right = [example.target.strip() for example in examples]
    assert task.score(right, examples) == {"exact_match": 100.0, "accuracy": 100.0}
    first = right[0].split()
    answers = [" ".join(first[:4]), right[1] + " a", "", right[3]]
    scores = task.score(answers, examples)
    assert scores["exact_match"] == 25.0
    assert scores["accuracy"] == pytest.approx(100 * (4 / 8 + 8 / 9 + 0 + 1) / 4)


def test_swaps_are_scored_by_their_number(tasks):
    task = tasks["probe-swaps"]
    answers = [example.target.strip() if example.group == "2_swaps" else "1 e 2 d 3 c 4 b 5 a" for example in task.test]
    scores = task.score(answers, task.test)
    assert scores["exact_match_2_swaps"] == 100.0 and scores["exact_match_16_swaps"] < 10


def test_sorting_examples_are_what_style_and_order_change(tasks):
    examples = sorting_examples(400)
    rising = [example for example in examples if example.prompt.startswith("sort")]
    written = [example for example in examples if example.prompt.startswith("write")]
    assert len(rising) == len(written) == 200
    assert all(example.target.split() == sorted(given(example)) for example in rising)
    capitals = sum(example.target.isupper() for example in written)
    assert 80 < capitals < 120 and all(example.target.isupper() or example.target.islower() for example in written)
    assert all(example.target.lower().split() == sorted(given(example)) for example in written)

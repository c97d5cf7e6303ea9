"""Synthetic tasks with known answers: what a family of models, or a method, can learn and what it cannot.

Texts are a few words from `WORDS`, drawn from a seed. Recall, copy and swaps ask which family can learn them from
nothing. Style and order ask which method can move a model that has been trained on `sorting_examples`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from ssmtune.data import Example
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.task import content_hash

LETTERS = string.ascii_lowercase[:16]
KEYS = LETTERS[:10]
DIGITS = string.digits
BOXES = "12345"
SWAPS = ["".join(pair) for pair in combinations(BOXES, 2)]
WORDS = (":", "recall", "copy", "swap", "sort", "write", *LETTERS, *LETTERS.upper(), *DIGITS, *SWAPS)
SIZES = {"train": 8192, "dev": 64, "test": 256}


@dataclass(frozen=True)
class ProbeTask(GenerationTask):
    """Exact match of greedy answers, and the share of their words that are right, each in 0..100."""

    max_new_tokens: int = 21
    max_length: int = 64

    def _scores(self, hypotheses: list[str], examples: list[Example]) -> dict[str, float]:
        shares = [
            _share_right(text.split(), example.target.split())
            for text, example in zip(hypotheses, examples, strict=True)
        ]
        count = max(1, len(shares))
        return {"exact_match": 100.0 * shares.count(1.0) / count, "accuracy": 100.0 * sum(shares) / count}


def _share_right(words: Sequence[str], truth: Sequence[str]) -> float:
    """Words in their place, of the longer of the two: an answer that goes on is not right."""
    return sum(map(str.__eq__, words, truth)) / max(len(words), len(truth))


def load(name: str, data_dir: str | Path | None) -> ProbeTask:
    """The probe of that name, always of the same examples; reads no files."""
    draw, description = PROBES[name]
    rng = Random(name)
    return ProbeTask(
        name=name,
        metric="exact_match",
        higher_is_better=True,
        **{split: [_drawn_for(split, draw, rng) for _ in range(size)] for split, size in SIZES.items()},
        description=f"{description}; exact match, and the share of words in their place, in %",
    )


def sorting_examples(count: int, seed: int = 0) -> list[Example]:
    """What a model is trained on before style and order: to sort from first to last, and to write in either case."""
    rng = Random(seed)
    return [(_sorted, _written_in_either_case)[i % 2](rng) for i in range(count)]


def _recall(rng: Random) -> Example:
    # few pairs as well as many: on few, looking up is learnt in a fraction of the steps
    keys = KEYS[: rng.choice((3, 10))]
    pairs = [(key, rng.choice(DIGITS)) for key in rng.sample(keys, len(keys))]
    return _example("recall", _words(pairs), _words(sorted(pairs)), group=f"{len(keys)}_pairs")


def _copy(rng: Random) -> Example:
    letters = rng.choices(LETTERS, k=16)
    return _example("copy", letters, letters)


def _swaps(rng: Random) -> Example:
    inside, swaps = dict(zip(BOXES, LETTERS, strict=False)), rng.choices(SWAPS, k=rng.choice((2, 3, 4, 16)))
    for i, j in swaps:
        inside[i], inside[j] = inside[j], inside[i]
    return _example("swap", swaps, _words(inside.items()), group=f"{len(swaps)}_swaps")


def _sorted(rng: Random, reverse: bool = False) -> Example:
    letters = rng.sample(LETTERS, 8)
    return _example("sort", letters, sorted(letters, reverse=reverse))


def _sorted_backwards(rng: Random) -> Example:
    return _sorted(rng, reverse=True)


def _written_in_capitals(rng: Random) -> Example:
    letters = rng.sample(LETTERS, 8)
    return _example("write", letters, [letter.upper() for letter in sorted(letters)])


def _written_in_either_case(rng: Random) -> Example:
    example = _written_in_capitals(rng)
    return Example(example.prompt, rng.choice((str.upper, str.lower))(example.target))


def _words(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [word for pair in pairs for word in pair]


def _example(skill: str, given: Sequence[str], answer: Sequence[str], group: str = "") -> Example:
    return Example(f"{skill} {' '.join(given)} :", f" {' '.join(answer)}", group=group)


def _drawn_for(split: str, draw: Callable[[Random], Example], rng: Random) -> Example:
    """An example whose prompt is in no other split: prompts are shared out by a hash."""
    while True:
        example = draw(rng)
        share = content_hash(example.prompt) % 100
        if split == ("test" if share < 20 else "dev" if share < 25 else "train"):
            return example


PROBES = {
    "probe-recall": (_recall, "give 3 or 10 letters with their digits back in the order of the alphabet"),
    "probe-copy": (_copy, "give sixteen letters back"),
    "probe-swaps": (_swaps, "say which letter is in which of five boxes after 2, 3, 4 or 16 swaps of two boxes"),
    "probe-style": (_written_in_capitals, "sort eight letters and write them in capitals"),
    "probe-order": (_sorted_backwards, "sort eight letters from last to first"),
}

"""What a task is: examples in three splits and a metric."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ssmtune.data import Example
from ssmtune.tasks import SPLITS
from ssmtune.tasks.terms import Terms, mean_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Metrics of many examples that are the mean of those of each.
MEANS = ("accuracy", "exact_match", "rouge_1", "rouge_2", "rouge_l")


@dataclass(frozen=True)
class Task(ABC):
    """Examples to learn from, examples to be measured on, and how.

    Args:
        name: the name `load_task` knows it by.
        metric: the key of `evaluate`'s result that is the task's headline number.
        higher_is_better: direction of `metric`.
        train, dev, test: disjoint examples.
        description: one line for reports: where the examples come from and how the metric is computed.
        choices: the possible answers of a choice task, else empty.
        max_new_tokens: longest answer to generate, 0 for tasks that generate nothing.
        max_length: longest example in tokens.
    """

    name: str
    metric: str
    higher_is_better: bool
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    description: str = ""
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 0
    max_length: int = 256

    @abstractmethod
    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        batch_size: int = 32,
    ) -> list:
        """What `model` makes of each of `examples`."""

    @abstractmethod
    def score(self, answers: Sequence, examples: Sequence[Example]) -> dict[str, float]:
        """Scores answers to `examples`.

        Returns:
            metric name to value; accuracies, correlations, BLEU and ROUGE are in 0..100 (correlations from -100).
            `invalid`, where answers can be: how many are no answer at all; they count as wrong everywhere.
        """

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        batch_size: int = 32,
    ) -> dict[str, float]:
        """Scores `model` on `examples`."""
        return self.score(self.answers(model, tokenizer, examples, batch_size), examples)

    def terms(self, answers: Sequence, examples: Sequence[Example]) -> Terms | None:
        """What each example adds to `metric`; None where the metric is no function of sums, or a costly one."""
        if self.metric not in MEANS:
            return None
        pairs = zip(answers, examples, strict=True)
        return mean_terms([self.score([answer], [example])[self.metric] for answer, example in pairs])

    def limited(self, limit: int | Mapping[str, int] | None, seed: int = 0) -> Task:
        """The task with at most `limit` examples per split, always the same ones for the same seed."""
        limits = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit or {})
        if unknown := set(limits) - set(SPLITS):
            raise ValueError(f"limit names unknown splits {sorted(unknown)}; the splits are train, dev and test.")
        kept = {}
        for split, size in limits.items():
            if size is None:
                continue
            if size < 1:
                raise ValueError(f"limit of {split} is {size}, expected at least 1 example.")
            kept[split] = subsample(getattr(self, split), size, seed)
        return replace(self, **kept)

    def sizes(self) -> dict[str, int]:
        return {split: len(getattr(self, split)) for split in SPLITS}

    def fingerprint(self) -> str:
        """A hash of every example, so that results on different data are never mixed."""
        digest = hashlib.sha256(self.name.encode())
        for split in SPLITS:
            for example in getattr(self, split):
                content = (split, example.prompt, example.target, example.references)
                digest.update(repr(content + (example.group,) * bool(example.group)).encode())
        return digest.hexdigest()[:16]


def with_groups(
    score: Callable[[list, list], dict[str, float]],
    answers: Sequence,
    examples: Sequence[Example],
    groups: Sequence[str],
) -> dict[str, float]:
    """Scores of all answers, then those of each group apart as `metric_group`; "" is no group."""
    scores = score(list(answers), list(examples))
    for group in sorted(set(groups) - {""}):
        rows = [i for i, own in enumerate(groups) if own == group]
        part = score([answers[i] for i in rows], [examples[i] for i in rows])
        scores |= {f"{name}_{group}": value for name, value in part.items()}
    return scores


def content_hash(*parts: object) -> int:
    """An integer that depends on the parts alone, on every machine (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def subsample(examples: Sequence[Example], size: int, seed: int = 0) -> list[Example]:
    """At most `size` of `examples`, chosen by a hash of their content, in their old order."""
    if len(examples) <= size:
        return list(examples)
    order = sorted(range(len(examples)), key=lambda i: (content_hash(seed, examples[i].prompt, examples[i].target), i))
    return [examples[i] for i in sorted(order[:size])]

"""Tasks measured by comparing generated text with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssmtune.data import Example
from ssmtune.tasks.task import Task, with_groups
from ssmtune.tasks.terms import Terms, bleu_terms
from ssmtune.tasks.text_metrics import corpus_bleu, rouge


@dataclass(frozen=True)
class GenerationTask(Task):
    """Corpus BLEU (sacrebleu) and ROUGE-L (rouge-score) of greedy generations, both in 0..100."""

    def answers(self, model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
        """One line of text for each example."""
        from ssmtune.generation import generate_texts

        texts = generate_texts(
            model,
            tokenizer,
            [example.prompt for example in examples],
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            max_length=self.max_length,
        )
        # Neighbouring lines must not run together, and a model may go on after the sentence asked for.
        return [text.strip().split("\n")[0].strip() for text in texts]

    def score(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The metrics of texts written for `examples`, and those of each group of examples."""
        return with_groups(self._scores, hypotheses, examples, [example.group for example in examples])

    def terms(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> Terms | None:
        if self.metric == "bleu":
            return bleu_terms(hypotheses, references_of(examples))
        return super().terms(hypotheses, examples)

    def _scores(self, hypotheses: list[str], examples: list[Example]) -> dict[str, float]:
        references = references_of(examples)
        return {"bleu": corpus_bleu(hypotheses, references), "rouge_l": rouge(hypotheses, references)["rouge_l"]}


@dataclass(frozen=True)
class SummaryTask(GenerationTask):
    """ROUGE-1, ROUGE-2 and ROUGE-L (rouge-score) of greedy generations, all in 0..100."""

    def _scores(self, hypotheses: list[str], examples: list[Example]) -> dict[str, float]:
        return rouge(hypotheses, references_of(examples), ("rouge_1", "rouge_2", "rouge_l"))


def references_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    return [example.references or (example.target.strip(),) for example in examples]

"""Tasks measured by comparing generated text with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssmtune.data import Example
from ssmtune.tasks.task import Task


@dataclass(frozen=True)
class GenerationTask(Task):
    """Corpus BLEU (sacrebleu) and ROUGE-L (rouge-score) of greedy generations, both in 0..100."""

    def evaluate(self, model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> dict[str, float]:
        from ssmtune.generation import generate_texts

        prompts = [example.prompt for example in examples]
        texts = generate_texts(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=batch_size,
            max_length=self.max_length,
        )
        # Neighbouring lines must not run together, and a model may go on after the sentence asked for.
        hypotheses = [text.strip().split("\n")[0] for text in texts]
        references = [example.references or (example.target.strip(),) for example in examples]
        return {"bleu": corpus_bleu(hypotheses, references), "rouge_l": rouge_l(hypotheses, references)}


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of sacrebleu's defaults (13a tokens, mixed case, 4-grams), any number of references per hypothesis."""
    sacrebleu = _metric_package("sacrebleu", "sacrebleu")
    streams = [
        [row[k] if k < len(row) else None for row in references] for k in range(max(len(row) for row in references))
    ]
    return float(sacrebleu.corpus_bleu(list(hypotheses), streams).score)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over hypotheses of the best ROUGE-L F-measure over their references, without stemming."""
    scorer = _metric_package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], use_stemmer=False)
    scores = [
        scorer.score_multi(list(row), text)["rougeL"].fmeasure for text, row in zip(hypotheses, references, strict=True)
    ]
    return 100.0 * sum(scores) / max(1, len(scores))


def _metric_package(module: str, package: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"this task's metric needs the package {package}, which is not installed ({error}).\n"
            "  Run: pip install 'ssmtune[eval]'"
        ) from None

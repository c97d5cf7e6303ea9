"""Metrics of generated texts, computed by the packages whose numbers are published."""

from __future__ import annotations

from collections.abc import Sequence

ROUGE_TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of sacrebleu's defaults (13a tokens, mixed case, 4-grams), any number of references per hypothesis."""
    sacrebleu = _metric_package("sacrebleu", "sacrebleu")
    streams = [
        [row[k] if k < len(row) else None for row in references] for k in range(max(len(row) for row in references))
    ]
    return float(sacrebleu.corpus_bleu(list(hypotheses), streams).score)


def sentence_bleu(hypothesis: str, references: Sequence[str]):
    """What `corpus_bleu` counts in one text: the BLEUScore of sacrebleu, with `counts`, `totals` and both lengths."""
    return _metric_package("sacrebleu", "sacrebleu").sentence_bleu(hypothesis, list(references))


def rouge(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ("rouge_l",)
) -> dict[str, float]:
    """Mean over hypotheses of the best F-measure over their references, without stemming, for each kind of ROUGE."""
    names = [ROUGE_TYPES[kind] for kind in kinds]
    scorer = _metric_package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(names, use_stemmer=False)
    scores = [scorer.score_multi(list(row), text) for text, row in zip(hypotheses, references, strict=True)]
    return {
        kind: 100.0 * sum(score[name].fmeasure for score in scores) / max(1, len(scores))
        for kind, name in zip(kinds, names, strict=True)
    }


def _metric_package(module: str, package: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"this task's metric needs the package {package}, which is not installed ({error}).\n"
            "  Run: pip install 'ssmtune[eval]'"
        ) from None

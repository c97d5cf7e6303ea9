"""Metrics as functions of sums over examples: all that a bootstrap over examples needs of a run, a few numbers each."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ORDERS = 4


@dataclass(frozen=True)
class Terms:
    """What each example adds to a metric.

    Args:
        kind: a key of METRICS.
        rows: (examples, terms) float32; the metric is METRICS[kind] of their sums.
    """

    kind: str
    rows: np.ndarray

    def packed(self) -> dict[str, Any]:
        """As JSON, small enough for thousands of examples."""
        data = zlib.compress(np.ascontiguousarray(self.rows, dtype="<f4").tobytes(), 9)
        return {"kind": self.kind, "terms": self.rows.shape[1], "data": base64.b64encode(data).decode()}

    @staticmethod
    def unpacked(packed: Mapping[str, Any]) -> Terms:
        values = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype="<f4")
        return Terms(packed["kind"], values.reshape(-1, packed["terms"]))

    def metric(self, sums: np.ndarray) -> np.ndarray:
        """The metric of sums of rows, (..., terms) -> (...)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return METRICS[self.kind](np.asarray(sums, dtype=np.float64))


def mean_terms(values: Sequence[float]) -> Terms:
    """Of a metric that is the mean of `values`."""
    return Terms("mean", np.stack([values, np.ones(len(values))], 1).astype(np.float32))


def perplexity_terms(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> Terms:
    """Of the perplexity per token."""
    return Terms("perplexity", np.stack([np.negative(log_likelihoods), tokens], 1).astype(np.float32))


def pearson_terms(answers: Sequence[float], truths: Sequence[float]) -> Terms:
    """Of Pearson's correlation, times 100."""
    x, y = np.asarray(answers, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    return Terms("pearson", np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1).astype(np.float32))


def bleu_terms(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Terms:
    """Of corpus BLEU: matching and all n-grams of each order, and the lengths of text and nearest reference."""
    from ssmtune.tasks.text_metrics import sentence_bleu

    scores = [sentence_bleu(text, row) for text, row in zip(hypotheses, references, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return Terms("bleu", np.array(rows, dtype=np.float32).reshape(-1, 2 * ORDERS + 2))


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(sums[..., 0] / sums[..., 1])


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    # constant on one side, as a draw can be: no correlation
    return np.where(spread > 0, 100 * (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-30)), 0.0)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU as sacrebleu computes it by default: an order without a match counts as half of one, then a quarter, ..."""
    correct, total = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    length, reference = sums[..., -2], sums[..., -1]
    halvings = np.cumsum(correct == 0, -1)
    precisions = np.where(correct == 0, 0.5**halvings, correct) / total
    score = 100 * np.exp(np.log(precisions).mean(-1)) * np.exp(np.minimum(0, 1 - reference / length))
    return np.where((correct.sum(-1) > 0) & (total > 0).all(-1), score, 0.0)


METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda sums: sums[..., 0] / sums[..., 1],
    "perplexity": _perplexity,
    "pearson": _pearson,
    "bleu": _bleu,
}

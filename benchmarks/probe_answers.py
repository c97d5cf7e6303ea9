"""The known answers of the probes, and whether measured ones agree with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssmtune.report.studies import Study
from ssmtune.report.table import mean_text
from ssmtune.summary import Spread

LEARNT, NOT_LEARNT = 90.0, 10.0
ZOOLOGY = "arXiv 2312.04927"
BASED = "arXiv 2402.18668"
REPEAT = "arXiv 2402.01032"
ILLUSION = "arXiv 2404.08819"
PREFIX = "arXiv 2310.19698"


@dataclass(frozen=True)
class Answer:
    """One known answer.

    Args:
        claim: what should come out.
        source: where it is from.
        measured: what came out, and of how many seeds; None if it was not run.
        holds: whether the two agree.
    """

    claim: str
    source: str
    measured: str | None
    holds: bool


def answers(studies: Sequence[Study]) -> list[Answer]:
    """The known answers about what is in these comparisons."""
    found = []
    for family, source in (("llama", ZOOLOGY), ("mamba", BASED)):
        pairs = _score(studies, family, "probe-recall", "full", "exact_match_10_pairs")
        found.append(_learnt(f"probe-recall: {family} looks up ten pairs", source, pairs))
    ours, theirs = (_score(studies, family, "probe-copy", "full") for family in ("llama", "mamba"))
    found.append(_learnt("probe-copy: llama learns it", REPEAT, ours))
    found.append(_behind("probe-copy: mamba is behind it at the same steps", REPEAT, theirs, ours))
    for family in ("llama", "mamba"):
        near, far = (_score(studies, family, "probe-swaps", "full", f"exact_match_{n}_swaps") for n in (2, 16))
        found.append(_learnt(f"probe-swaps: {family} follows 2 swaps", ILLUSION, near))
        found.append(_not_learnt(f"probe-swaps: {family} does not follow 16", ILLUSION, far))
    for study in studies:
        rows = {task.name: [row for row in task.rows if row.name != "base"] for task in study.summary.tasks}
        for row in rows.get("probe-style", []):
            found.append(_learnt(f"probe-style: {row.title} moves {study.name}", PREFIX, row.scores))
        for row in rows.get("probe-order", []):
            claim = f"probe-order: {row.title}"
            if row.kind == "full":
                found.append(_learnt(f"{claim} teaches it to {study.name}", PREFIX, row.scores))
            elif row.kind in ("prompt", "state"):
                found.append(_not_learnt(f"{claim} does not teach it to {study.name}", PREFIX, row.scores))
    return [answer for answer in found if answer.measured is not None]


def table(found: Sequence[Answer]) -> str:
    """The answers as Markdown."""
    lines = ["| known answer | source | exact match % (seeds) | came out |", "|---|---|---:|---|"]
    for answer in found:
        lines.append(
            f"| {answer.claim} | {answer.source} | {answer.measured} | {'yes' if answer.holds else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def _learnt(claim: str, source: str, score: Spread | None) -> Answer:
    return Answer(claim, source, _text(score), score is not None and score.mean >= LEARNT)


def _not_learnt(claim: str, source: str, score: Spread | None) -> Answer:
    return Answer(claim, source, _text(score), score is not None and score.mean <= NOT_LEARNT)


def _behind(claim: str, source: str, score: Spread | None, other: Spread | None) -> Answer:
    """Every seed is below every seed of the other."""
    known = score is not None and other is not None
    return Answer(claim, source, _text(score), known and max(score.values) < min(other.values))


def _text(score: Spread | None) -> str | None:
    return None if score is None else f"{mean_text(score)} ({len(score.values)})"


def _score(studies: Sequence[Study], model: str, task: str, method: str, metric: str | None = None) -> Spread | None:
    for study in studies:
        for summary in study.summary.tasks:
            for row in summary.rows:
                if (study.name, summary.name, row.name) == (model, task, method):
                    return row.others.get(metric) if metric else row.scores
    return None

"""SAMSum: summarise a chat (Gliwa et al., 2019)."""

from __future__ import annotations

from pathlib import Path

from ssmtune.data import Example
from ssmtune.rows import hub_rows
from ssmtune.tasks.generation import SummaryTask
from ssmtune.tasks.sources import Release, broken, read_json_list

RELEASE = Release(
    "samsum",
    {"train": ("train.json",), "dev": ("val.json",), "test": ("test.json",)},
    ("samsum", "corpus"),
    "It is released with https://arxiv.org/abs/1911.12237 as corpus.7z under CC BY-NC-ND 4.0.",
    hub="knkarthick/samsum",
)
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def load(name: str, data_dir: str | Path | None) -> SummaryTask:
    """SAMSum from `data_dir`: the folder of its three json files or one above it, or a name on the hub.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken file, with its line or entry.
    """
    paths = RELEASE.find(data_dir)
    if paths is None:
        rows = {split: hub_rows(str(data_dir), there) for split, there in HUB_SPLITS.items()}
    else:
        rows = {split: read_json_list(path) for split, path in paths.items()}
    source = paths or dict.fromkeys(HUB_SPLITS, data_dir)
    examples = {
        split: [_example(f"{source[split]}: {where}", row) for where, row in found] for split, found in rows.items()
    }
    return SummaryTask(
        name=name,
        metric="rouge_1",
        higher_is_better=True,
        **examples,
        max_new_tokens=100,
        max_length=1024,
        description="SAMSum: a chat to its summary, greedy decoding; mean ROUGE-1 F (rouge-score, no stemming)",
    )


def _example(where: str, row) -> Example:
    dialogue, summary = row.get("dialogue"), row.get("summary")
    if not isinstance(dialogue, str) or not isinstance(summary, str) or not summary.strip():
        raise broken(f"{where} lacks a dialogue or a summary", f"Its keys: {', '.join(row)}")
    chat = "\n".join(line.strip() for line in dialogue.splitlines())
    summary = " ".join(summary.split())
    return Example(f"{chat}\nIn short:", f" {summary}", (summary,))

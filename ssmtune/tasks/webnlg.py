"""WebNLG: put facts from DBpedia into words (Gardent et al., INLG 2017; the challenge of 2017).

A third of the test set's categories occur in no training example, and are scored apart: `bleu_seen`, `bleu_unseen`.
BLEU is sacrebleu's, against all references, on the texts as they are; the challenge's own script lower-cases and splits
them first, and gives higher numbers.
"""

from __future__ import annotations

from pathlib import Path

from ssmtune.rows import hub_rows
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.sources import Release, broken
from ssmtune.tasks.triples import Entry, checked, one_each, read_xml, with_references

TEST = "testdata_with_lex"
SUBSET = "webnlg_challenge_2017"
RELEASE = Release(
    "webnlg",
    {"train": ("train",), "dev": ("dev",), "test": (f"test/{TEST}.xml",)},
    ("webnlg2017", "webnlg_challenge_2017"),
    "It is released at https://gitlab.com/shimorina/webnlg-dataset under CC BY-NC-SA 4.0.",
    hub="webnlg-challenge/web_nlg@refs/convert/parquet",
)


def load(name: str, data_dir: str | Path | None) -> GenerationTask:
    """WebNLG from `data_dir`: the folder webnlg_challenge_2017 of the release or the one above, or a name on the hub.

    One training example per text; dev and test have one per set of triples, with all its texts as references.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken file, with its line or entry.
    """
    paths = RELEASE.find(data_dir)
    if paths is None:
        entries = {split: _entries_of_hub(str(data_dir), split) for split in ("train", "dev", "test")}
    else:
        entries = {split: _entries_below(path) for split, path in paths.items()}
    seen = {entry.category for entry in entries["train"]}
    return GenerationTask(
        name=name,
        metric="bleu",
        higher_is_better=True,
        train=one_each(entries["train"]),
        dev=with_references(entries["dev"]),
        test=with_references(entries["test"], lambda category: "seen" if category in seen else "unseen"),
        max_new_tokens=100,
        max_length=384,
        description="WebNLG 2017: DBpedia triples to a text, greedy decoding; corpus BLEU (sacrebleu) against all "
        "references, of categories seen and unseen in training together",
    )


def _entries_below(path: Path) -> list[Entry]:
    files = [path] if path.is_file() else sorted(path.rglob("*.xml"))
    if not files:
        raise broken(f"{path} holds no .xml file", "The release has them in folders such as 1triples")
    return [entry for file in files for entry in read_xml(file)]


def _entries_of_hub(dataset: str, split: str) -> list[Entry]:
    entries = []
    for where, row in hub_rows(dataset, split, SUBSET):
        try:
            # the hub's test split is all three files of the challenge, one after another
            if split != "test" or row["test_category"] == TEST:
                triples = [triple.split(" | ") for triple in row["modified_triple_sets"]["mtriple_set"][0]]
                entries.append(checked(f"{dataset}: {where}", triples, row["lex"]["text"], row["category"]))
        except (KeyError, IndexError, TypeError) as error:
            raise broken(
                f"{dataset}: {where} is no entry of WebNLG ({type(error).__name__}: {error})",
                "It needs category, modified_triple_sets and lex",
            ) from None
    return entries

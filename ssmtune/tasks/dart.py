"""DART: put triples made of tables, WebNLG and E2E into words (Nan et al., NAACL 2021), version 1.1.1.

BLEU is sacrebleu's, against all references, on the texts as they are. The paper's METEOR is not computed: nltk's needs
a download of WordNet, and the original one Java.
"""

from __future__ import annotations

from pathlib import Path

from ssmtune.rows import hub_rows
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.sources import Release, broken, read_json_list
from ssmtune.tasks.triples import Entry, checked, one_each, read_xml, with_references

RELEASE = Release(
    "dart",
    {
        split: tuple(f"dart-v1.1.1-full-{split}{suffix}" for suffix in (".json", ".xml"))
        for split in ("train", "dev", "test")
    },
    ("dart", "v1.1.1", "data/v1.1.1", "dart/data/v1.1.1"),
    "It is released at https://github.com/Yale-LILY/dart in data/v1.1.1 under the MIT licence.",
    hub="Yale-LILY/dart@refs/convert/parquet",
)
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def load(name: str, data_dir: str | Path | None) -> GenerationTask:
    """DART from `data_dir`: the folder of the release's json or xml files or one above it, or a name on the hub.

    One training example per text; dev and test have one per set of triples, with all its texts as references.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken file, with its line or entry.
    """
    paths = RELEASE.find(data_dir)
    if paths is None:
        entries = {split: _entries_of_hub(str(data_dir), there) for split, there in HUB_SPLITS.items()}
    else:
        entries = {split: read(path) for split, path in paths.items()}
    return GenerationTask(
        name=name,
        metric="bleu",
        higher_is_better=True,
        train=one_each(entries["train"]),
        dev=with_references(entries["dev"]),
        test=with_references(entries["test"]),
        max_new_tokens=100,
        max_length=384,
        description="DART 1.1.1: triples to a text, greedy decoding; corpus BLEU (sacrebleu) against all references",
    )


def read(path: Path) -> list[Entry]:
    """The entries of one file of the release.

    Raises:
        ValueError: it is neither XML nor JSON, naming the line, or an entry has not what it needs.
    """
    if path.suffix == ".xml":
        return list(read_xml(path))
    return [
        _entry(f"{path}: {where}", row, lambda row: [annotation["text"] for annotation in row["annotations"]])
        for where, row in read_json_list(path)
    ]


def _entries_of_hub(dataset: str, split: str) -> list[Entry]:
    # lists of objects are objects of lists there
    return [
        _entry(f"{dataset}: {split} {where}", row, lambda row: row["annotations"]["text"])
        for where, row in hub_rows(dataset, split)
    ]


def _entry(where: str, row, texts_of) -> Entry:
    try:
        return checked(where, row["tripleset"], texts_of(row))
    except (KeyError, TypeError) as error:
        raise broken(
            f"{where} is no entry of DART ({type(error).__name__}: {error})", "It needs tripleset and annotations"
        ) from None

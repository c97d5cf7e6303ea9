"""GLUE: nine tasks of understanding English (Wang et al., ICLR 2019).

Read from the tsv files of the official release, or from the hub. The labels of the official test sets are not public:
`test` is the official dev set, whole, and `dev` a tenth of the official train set, a thousand examples at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssmtune.data import Example, hold_out
from ssmtune.rows import hub_rows
from ssmtune.tasks.labels import LabelTask, NumberTask
from ssmtune.tasks.sources import Release, broken, read_tsv

HUB = "nyu-mll/glue"
LARGEST_DEV = 1000
SCALE = (0.0, 5.0)


@dataclass(frozen=True)
class Glue:
    """One of the nine.

    Args:
        folder: its folder in the release.
        prompt: with the sentences as {0} and {1}.
        columns: of the sentences, in the files.
        answers: label in the files -> what the model has to write, in the order of the labels' numbers; empty where
            the label is a score.
        label: column of the label, in the files.
        hub_columns: of the sentences, on the hub, where they differ.
        metrics: the first is the headline.
        header: the columns, for files that do not begin with them.
        tests: file that is measured on -> its group and its split on the hub.
        skip_broken: whether the official train file has rows with line breaks in them, which all its readers skip.
    """

    folder: str
    prompt: str
    columns: tuple[str, ...]
    answers: dict[str, str]
    label: str = "label"
    hub_columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    tests: tuple[tuple[str, str, str], ...] = (("dev.tsv", "", "validation"),)
    skip_broken: bool = False


GLUE = {
    "sst2": Glue(
        "SST-2",
        "Review: {0}\nPositive or negative?",
        ("sentence",),
        {"0": "negative", "1": "positive"},
    ),
    "cola": Glue(
        "CoLA",
        "Sentence: {0}\nIs it good English, yes or no?",
        ("sentence",),
        {"0": "no", "1": "yes"},
        metrics=("matthews", "accuracy"),
        header=("source", "label", "star", "sentence"),
    ),
    "mrpc": Glue(
        "MRPC",
        "First: {0}\nSecond: {1}\nDo they say the same, yes or no?",
        ("#1 String", "#2 String"),
        {"0": "no", "1": "yes"},
        label="Quality",
        hub_columns=("sentence1", "sentence2"),
        metrics=("accuracy", "f1"),
    ),
    "qqp": Glue(
        "QQP",
        "First: {0}\nSecond: {1}\nDo they ask the same, yes or no?",
        ("question1", "question2"),
        {"0": "no", "1": "yes"},
        label="is_duplicate",
        metrics=("accuracy", "f1"),
        skip_broken=True,
    ),
    "stsb": Glue(
        "STS-B",
        "First: {0}\nSecond: {1}\nHow alike are they, from 0.0 to 5.0?",
        ("sentence1", "sentence2"),
        {},
        label="score",
        metrics=("pearson", "spearman"),
    ),
    "mnli": Glue(
        "MNLI",
        "Premise: {0}\nHypothesis: {1}\nDoes it follow, yes, maybe or no?",
        ("sentence1", "sentence2"),
        {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
        label="gold_label",
        hub_columns=("premise", "hypothesis"),
        tests=(
            ("dev_matched.tsv", "matched", "validation_matched"),
            ("dev_mismatched.tsv", "mismatched", "validation_mismatched"),
        ),
    ),
    "qnli": Glue(
        "QNLI",
        "Question: {0}\nSentence: {1}\nIs the answer in it, yes or no?",
        ("question", "sentence"),
        {"entailment": "yes", "not_entailment": "no"},
    ),
    "rte": Glue(
        "RTE",
        "Premise: {0}\nHypothesis: {1}\nDoes it follow, yes or no?",
        ("sentence1", "sentence2"),
        {"entailment": "yes", "not_entailment": "no"},
    ),
    "wnli": Glue(
        "WNLI",
        "Premise: {0}\nHypothesis: {1}\nDoes it follow, yes or no?",
        ("sentence1", "sentence2"),
        {"0": "no", "1": "yes"},
    ),
}


def load(name: str, data_dir: str | Path | None) -> LabelTask | NumberTask:
    """A GLUE task from `data_dir`: its folder, the folder of all, one above, or a name on the hub.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files; names them.
        ValueError: a broken row or an unknown label, with its line.
    """
    glue = GLUE[name]
    release = Release(
        name,
        {file: (file,) for file in ("train.tsv", *(file for file, _, _ in glue.tests))},
        (glue.folder, f"glue/{glue.folder}", f"glue_data/{glue.folder}"),
        f"It is {glue.folder} of GLUE, released at https://gluebenchmark.com/tasks under its own source's terms.",
        hub=HUB,
    )
    files = release.find(data_dir)

    def examples(file: str, group: str, split: str) -> list[Example]:
        rows = _rows_of_hub(str(data_dir), name, split) if files is None else _rows_of_file(glue, files[file])
        return [_example(glue, where, texts, label, group) for where, texts, label in rows]

    official = examples("train.tsv", "", "train")
    train, dev = hold_out(official, min(0.1, LARGEST_DEV / len(official)))
    shared = {
        "name": name,
        "metric": glue.metrics[0],
        "higher_is_better": True,
        "train": train,
        "dev": dev,
        "test": [example for test in glue.tests for example in examples(*test)],
        "max_length": 512,
        "description": f"GLUE {glue.folder}, measured on the official dev set; greedy decoding, "
        f"{' and '.join(glue.metrics)} times 100",
    }
    if not glue.answers:
        return NumberTask(**shared, scale=SCALE)
    labels = tuple(glue.answers.values())
    choices = labels if glue.metrics[0] == "accuracy" else ()
    return LabelTask(**shared, labels=labels, metrics=glue.metrics, choices=choices)


def _rows_of_file(glue: Glue, path: Path) -> Iterator[tuple[str, list[str], str]]:
    for where, row in read_tsv(path, (*glue.columns, glue.label), glue.header, glue.skip_broken):
        yield where, [row[column] for column in glue.columns], row[glue.label]


def _rows_of_hub(dataset: str, name: str, split: str) -> Iterator[tuple[str, list[str], str]]:
    glue = GLUE[name]
    for where, row in hub_rows(dataset, split, name):
        try:
            label = row["label"]
            texts = [row[column] for column in glue.hub_columns or glue.columns]
        except KeyError as error:
            columns = ", ".join(row)
            raise broken(f"{dataset}: {split} {where} has no column {error}", f"Its columns: {columns}") from None
        labels = list(glue.answers)
        yield f"{dataset}: {split} {where}", texts, labels[label] if label in range(len(labels)) else label


def _example(glue: Glue, where: str, texts: list[str], label: str, group: str) -> Example:
    prompt = glue.prompt.format(*(text.strip() for text in texts))
    if glue.answers:
        if label not in glue.answers:
            raise broken(f"{where} has the label {label!r}", f"The labels of {glue.folder}: {', '.join(glue.answers)}")
        return Example(prompt, f" {glue.answers[label]}", group=group)
    try:
        score = float(label)
    except ValueError:
        raise broken(f"{where} has the score {label!r}", "Scores are numbers from 0 to 5") from None
    if not SCALE[0] <= score <= SCALE[1]:
        raise broken(f"{where} has the score {label!r}", "Scores are numbers from 0 to 5")
    return Example(prompt, f" {score:.1f}", (repr(score),), group)

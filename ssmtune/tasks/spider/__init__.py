"""Spider: a question about a database to SQL (Yu et al., EMNLP 2018).

`test` is the official dev set, whole, since the official test set came later and apart; `dev` is a tenth of the
training databases, so that no database is in two splits. Queries are learnt as they are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssmtune.config import ConfigError
from ssmtune.data import Example, hold_out
from ssmtune.tasks.generation import GenerationTask
from ssmtune.tasks.sources import Release, broken, read_json_list
from ssmtune.tasks.spider.execution import FailedQuery, QueryRunner, Rows, same_result
from ssmtune.tasks.spider.grammar import UnreadableQuery, parse
from ssmtune.tasks.spider.match import exact_match, hardness
from ssmtune.tasks.spider.schema import Schema, read_schemas
from ssmtune.tasks.task import with_groups

RELEASE = Release(
    "spider",
    {"train": ("train_spider.json",), "test": ("dev.json",), "tables": ("tables.json",), "database": ("database",)},
    ("spider", "spider_data"),
    "It is released at https://yale-lily.github.io/spider under CC BY-SA 4.0; the hub has it without databases.",
)


@dataclass(frozen=True)
class SpiderTask(GenerationTask):
    """Execution accuracy and exact set match of the SQL that the model writes, overall and by hardness, in 0..100.

    `invalid` queries do not run. Example.group is the database.

    Args:
        schemas: database -> its schema.
        databases: the folder of NAME/NAME.sqlite.
        timeout: seconds for each query.
    """

    schemas: Mapping[str, Schema] = field(default_factory=dict)
    databases: Path = Path()
    timeout: float = 30.0

    def score(self, hypotheses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        with QueryRunner(self.timeout) as runner:
            verdicts = [self._verdict(runner, sql, example) for sql, example in zip(hypotheses, examples, strict=True)]
        levels = [hardness(example.target, self.schemas[example.group]) for example in examples]
        invalid = sum(executed is None for executed, _ in verdicts)
        return with_groups(_shares, verdicts, examples, levels) | {"invalid": float(invalid)}

    def _verdict(self, runner: QueryRunner, sql: str, example: Example) -> tuple[bool | None, bool]:
        """(whether the result is right, None where there is none; whether the clauses match)"""
        gold = example.target.strip()
        database = self.databases / example.group / f"{example.group}.sqlite"
        try:
            wanted = runner.run(database, gold)
        except FailedQuery as error:
            raise RuntimeError(
                f"the right query itself fails on {database}: {error}.\n  It is {gold!r}.\n"
                "  Get the database again from the release."
            ) from None
        matched = exact_match(sql, gold, self.schemas[example.group])
        try:
            found: Rows = runner.run(database, sql)
        except FailedQuery:
            return None, matched
        return same_result(found, wanted, ordered="order by" in gold.lower()), matched


def _shares(verdicts: list[tuple[bool | None, bool]], examples: list[Example]) -> dict[str, float]:
    executed, matched = zip(*verdicts, strict=True) if verdicts else ((), ())
    count = max(1, len(verdicts))
    return {"execution": 100.0 * sum(map(bool, executed)) / count, "exact_match": 100.0 * sum(matched) / count}


def load(name: str, data_dir: str | Path | None) -> SpiderTask:
    """Spider from `data_dir`: the folder of the release or the one above.

    Raises:
        ConfigError: there is no `data_dir`, or it lacks files or databases; names them.
        ValueError: a broken file, with its line or entry.
    """
    paths = RELEASE.find(data_dir)
    schemas = read_schemas(paths["tables"])
    train, test = _examples(paths["train"], schemas), _examples(paths["test"], schemas, measured=True)
    _, held_out = hold_out(sorted({example.group for example in train}), 0.1)
    lacking = sorted({e.group for e in test if not (paths["database"] / e.group / f"{e.group}.sqlite").is_file()})
    if lacking:
        raise ConfigError(
            f"task {name}: {paths['database']} lacks {len(lacking)} of the databases that answers are run on, such as "
            f"{lacking[0]}/{lacking[0]}.sqlite.\n  Unpack all of the release there.\n  {RELEASE.where}"
        )
    return SpiderTask(
        name=name,
        metric="execution",
        higher_is_better=True,
        schemas=schemas,
        databases=paths["database"],
        train=[example for example in train if example.group not in held_out],
        dev=[example for example in train if example.group in held_out],
        test=test,
        max_new_tokens=160,
        max_length=1536,
        description="Spider: a question and a schema to SQL, measured on the official dev set, greedy decoding; "
        "execution accuracy in %",
    )


def _examples(path: Path, schemas: Mapping[str, Schema], measured: bool = False) -> list[Example]:
    """Those that are `measured` are parsed now, not after hours of training; three of the official others cannot be."""
    examples = []
    for where, row in read_json_list(path):
        if missing := [key for key in ("question", "query", "db_id") if not isinstance(row.get(key), str)]:
            raise broken(f"{path}: {where} has no {missing[0]}", f"Its keys: {', '.join(row)}")
        if row["db_id"] not in schemas:
            raise broken(f"{path}: {where} is about {row['db_id']!r}", "tables.json has no database of that name")
        query = " ".join(row["query"].strip().rstrip(";").splitlines()).strip()
        if measured:
            try:
                parse(query, schemas[row["db_id"]])
            except UnreadableQuery as error:
                raise broken(f"{path}: {where} has a query outside Spider's grammar ({error})", query) from None
        examples.append(Example(prompt(row["question"], schemas[row["db_id"]]), f" {query}", (query,), row["db_id"]))
    return examples


def prompt(question: str, schema: Schema) -> str:
    """The schema first: where a prompt is too long its beginning is cut, and the question stays."""
    return f"{schema.text}\nQuestion: {question.strip()}\nSQL:"

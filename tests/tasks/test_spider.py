import dataclasses
import json
import sqlite3

import pytest

from ssmtune.config import ConfigError
from ssmtune.tasks import load_task

TABLES = [
    {
        "db_id": name,
        "table_names_original": ["singer", "concert"],
        "table_names": ["singer", "concert"],
        "column_names_original": [[-1, "*"], [0, "Singer_ID"], [0, "Name"], [0, "Age"], [1, "ID"], [1, "Singer_ID"]],
        "column_names": [[-1, "*"], [0, "singer id"], [0, "name"], [0, "age"], [1, "id"], [1, "singer id"]],
        "column_types": ["text", "number", "text", "number", "number", "number"],
        "primary_keys": [1, 4],
        "foreign_keys": [[5, 1]],
    }
    for name in ("music", "opera")
]
QUESTIONS = [
    ("music", "How many singers are there?", "SELECT count(*) FROM singer ;"),
    ("music", "Who is the oldest?", "SELECT Name FROM singer ORDER BY Age DESC LIMIT 1"),
    ("music", "Whose concerts are there?",
     "SELECT T1.Name FROM singer AS T1 JOIN concert AS T2 ON T1.Singer_ID = T2.Singer_ID"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    questions = [{"db_id": name, "question": question, "query": query} for name, question, query in QUESTIONS]
    elsewhere = [question | {"db_id": "opera"} for question in questions]
    (tmp_path / "tables.json").write_text(json.dumps(TABLES))
    (tmp_path / "train_spider.json").write_text(json.dumps(questions[:2] + elsewhere))
    (tmp_path / "dev.json").write_text(json.dumps(questions))
    (tmp_path / "database" / "music").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "database" / "music" / "music.sqlite") as connection:
        connection.execute("CREATE TABLE singer (Singer_ID int, Name text, Age int)")
        connection.execute("CREATE TABLE concert (ID int, Singer_ID int)")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?)", [(1, "Ada", 40), (2, "Bo", 20), (3, "Cy", 30)])
        connection.executemany("INSERT INTO concert VALUES (?, ?)", [(1, 2), (2, 1), (3, 2)])
    return tmp_path


def test_load_keeps_databases_in_one_split(folder):
    task = load_task("spider", folder)
    assert task == load_task("spider", folder.parent / folder.name)
    assert sorted((task.sizes()["train"], task.sizes()["dev"])) == [2, 3] and task.sizes()["test"] == 3
    assert not {example.group for example in task.train} & {example.group for example in task.dev}


def test_prompt_has_the_schema_and_the_target_the_query(folder):
    example = load_task("spider", folder).test[0]
    assert example.prompt == (
        "Tables: singer(Singer_ID number, Name text, Age number); concert(ID number, Singer_ID number).\n"
        "Keys: concert.Singer_ID = singer.Singer_ID.\n"
        "Question: How many singers are there?\nSQL:"
    )
    assert example.target == " SELECT count(*) FROM singer"


def test_right_queries_are_right_at_every_level(folder):
    task = load_task("spider", folder)
    scores = task.score([example.target.strip() for example in task.test], task.test)
    levels = {"", "_easy", "_medium"}
    assert scores == {f"{name}{level}": 100.0 for name in ("execution", "exact_match") for level in levels} | {
        "invalid": 0.0
    }


def test_execution_and_match_are_counted_apart(folder):
    task = load_task("spider", folder)
    texts = [
        "SELECT count(*) FROM singer WHERE Age > 0",  # the same result, other clauses
        "SELECT name FROM singer ORDER BY age DESC LIMIT 2",  # other rows, the same clauses without their numbers
        "SELECT Name FROM singers",  # does not run
    ]
    assert task.score(texts, task.test) == {
        "execution": pytest.approx(100 / 3),
        "exact_match": pytest.approx(100 / 3),
        "execution_easy": 50.0,
        "exact_match_easy": 0.0,
        "execution_medium": 0.0,
        "exact_match_medium": 100.0,
        "invalid": 1.0,
    }


def test_a_query_that_never_ends_is_invalid(folder):
    task = dataclasses.replace(load_task("spider", folder), timeout=0.5)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    scores = task.score([endless, task.test[1].target, "DROP TABLE singer"], task.test)
    assert scores["invalid"] == 2 and scores["execution"] == pytest.approx(100 / 3)
    # and nothing was dropped
    assert task.score(["SELECT 3"], task.test[:1])["execution"] == 100


def test_evaluate_of_an_untuned_model_finds_no_query(folder, byte_model, byte_tokenizer):
    task = dataclasses.replace(load_task("spider", folder), max_new_tokens=6)
    scores = task.evaluate(byte_model, byte_tokenizer, task.test)
    assert scores.pop("invalid") == 3 and set(scores.values()) == {0.0}


def test_a_database_on_which_the_right_query_fails_is_an_error(folder):
    task = load_task("spider", folder)
    (folder / "database" / "music" / "music.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(
        RuntimeError, match=r"(?s)right query itself fails on .*music\.sqlite: .*not a database.*release"
    ):
        task.score(["SELECT 3"], task.test[:1])


def test_missing_pieces_are_named(folder):
    (folder / "database" / "music" / "music.sqlite").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of the databases .* such as music/music\.sqlite"):
        load_task("spider", folder)
    (folder / "tables.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks tables\.json"):
        load_task("spider", folder)
    # the hub has no databases: a name that looks like one of its datasets is a folder that is not there
    with pytest.raises(ConfigError, match="xlangai/spider does not exist"):
        load_task("spider", "xlangai/spider")


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("dev.json", '"question": "Who', '"utterance": "Who', r"entry 2 has no question.*db_id, utterance, query"),
        ("dev.json", '"db_id": "music"', '"db_id": "jazz"', r"entry 1 is about 'jazz'.*no database of that name"),
        ("dev.json", "ORDER BY Age", "ORDER BY Height", r"entry 2 has a query outside Spider's grammar.*'height'"),
        ("tables.json", '"foreign_keys"', '"keys"', r"entry 1 is no schema of Spider \(KeyError: 'foreign_keys'\)"),
        ("tables.json", "[[5, 1]]", "[[5, 9]]", r"entry 1 is no schema of Spider \(IndexError"),
        ("tables.json", "]", "", r"line 1 is not valid JSON"),
    ],
)
def test_broken_files_are_named_with_their_place(folder, file, old, new, said):
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"(?s){file}: {said}.*\n  Get the file again"):
        load_task("spider", folder)


def test_the_official_release_with_empty_databases(released, tmp_path):
    """All right queries run, are right, and have the published numbers at each level."""
    for path in (released / "spider").glob("*.json"):
        (tmp_path / path.name).symlink_to(path)
    measured = {entry["db_id"] for entry in json.loads((tmp_path / "dev.json").read_text())}
    for entry in json.loads((tmp_path / "tables.json").read_text()):
        if entry["db_id"] not in measured:
            continue
        folder = tmp_path / "database" / entry["db_id"]
        folder.mkdir(parents=True)
        with sqlite3.connect(folder / f"{entry['db_id']}.sqlite") as connection:
            connection.execute("BEGIN")
            for number, table in enumerate(entry["table_names_original"]):
                columns = [column for owner, column in entry["column_names_original"] if owner == number]
                # SQLite makes that one itself
                if table != "sqlite_sequence":
                    connection.execute(f'CREATE TABLE "{table}" ({", ".join(map(json.dumps, columns))})')
    task = load_task("spider", tmp_path)
    sizes = task.sizes()
    assert sizes == {"train": 6301, "dev": 699, "test": 1034}
    assert len({example.group for example in task.dev}) == 14
    scores = task.score([example.target.strip() for example in task.test], task.test)
    assert set(scores.values()) == {0.0, 100.0} and scores["invalid"] == 0

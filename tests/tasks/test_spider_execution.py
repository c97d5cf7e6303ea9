import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from ssmtune.tasks.spider.execution import CHILD, FailedQuery, QueryRunner, same_result

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("database") / "a b%20?.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a int, b text, c blob)")
        connection.execute("CREATE INDEX i ON t (a)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?)", [(1, "x", b"\xff"), (2, None, None)])
        # a text in Latin-1, of which the official databases have some
        connection.execute("INSERT INTO t VALUES (3, CAST(x'63616665e9' AS text), NULL)")
    return path


@pytest.fixture(scope="module")
def runner():
    with QueryRunner(timeout=20.0, max_rows=50, max_characters=10_000) as runner:
        yield runner


def test_run_gives_the_rows(runner, database):
    assert runner.run(database, "SELECT a, b FROM t WHERE a < 3") == [(1, "x"), (2, None)]
    assert runner.run(database, "SELECT b, c FROM t WHERE a <> 2;") == [("x", "ff"), ("cafe", None)]
    assert runner.run(database, "SELECT a FROM t WHERE a > 9") == []
    assert runner.run(database, "SELECT 0.5, 1e999, 'line\nbreak'") == [(0.5, float("inf"), "line\nbreak")]


WRITING = [
    "DROP TABLE t",
    "DELETE FROM t",
    "INSERT INTO t VALUES (1, 2, 3)",
    "UPDATE t SET a = 0",
    "CREATE TEMP TABLE s (a)",
    "CREATE TABLE main.s AS SELECT 1",
    "ATTACH '{other}' AS other",
    "VACUUM INTO '{other}'",
    "BEGIN",
    "PRAGMA query_only = OFF",
    "SELECT * FROM pragma_database_list",
    "SELECT load_extension('{other}')",
    "REINDEX",
    "ANALYZE",
]


@pytest.mark.parametrize("sql", WRITING)
def test_run_denies_all_but_reading(sql, runner, database, tmp_path):
    before = database.read_bytes()
    other = tmp_path / "other"
    with pytest.raises(FailedQuery, match="[Aa]uthoriz"):
        runner.run(database, sql.format(other=other))
    assert database.read_bytes() == before and not other.exists()
    assert sorted(path.name for path in database.parent.iterdir()) == [database.name]


@pytest.mark.parametrize(
    "sql, said",
    [
        ("", "no query"),
        ("SELECT missing FROM t", "no such column"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT '\ud800'", "surrogates"),
        ("SELECT '\0'", "null character"),
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c", "more than 50 rows"),
        ("SELECT hex(zeroblob(10000))", "more than 10000 characters"),
    ],
)
def test_run_says_why_there_are_no_rows(sql, said, runner, database):
    process = runner.process
    with pytest.raises(FailedQuery, match=said):
        runner.run(database, sql)
    assert runner.process is process


def test_run_kills_what_takes_too_long_and_goes_on(database):
    with QueryRunner(timeout=5.0) as runner:
        runner.run(database, "SELECT 1")
        runner.timeout, first = 0.3, runner.process
        with pytest.raises(FailedQuery, match=r"no result within 0\.3 s"):
            runner.run(database, ENDLESS)
        assert first.poll() is not None
        runner.timeout = 20.0
        assert runner.run(database, "SELECT 1") == [(1,)]
        second = runner.process
    assert second.poll() is not None


def test_run_goes_on_when_the_process_was_killed(database):
    with QueryRunner() as runner:
        runner.run(database, "SELECT 1")
        runner.process.kill()
        runner.process.wait()
        with pytest.raises(FailedQuery, match="process that ran it ended"):
            runner.run(database, "SELECT 1")
        assert runner.run(database, "SELECT 1") == [(1,)]


def test_the_process_ends_by_itself_without_a_parent_to_kill_it(database):
    request = json.dumps({"database": str(database), "sql": ENDLESS, "seconds": 0})
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(CHILD), "10", "1000", str(2**30)], input=request, text=True, timeout=300
    )
    assert ended.returncode == -signal.SIGXCPU


def test_run_limits_memory(database):
    with QueryRunner(timeout=20.0, max_bytes=2**28) as runner:
        with pytest.raises(FailedQuery, match="[Mm]emory"):
            runner.run(database, "SELECT hex(zeroblob(400000000))")
        assert runner.run(database, "SELECT 1") == [(1,)]


def test_run_of_a_missing_database_makes_none(runner, tmp_path):
    with pytest.raises(FailedQuery, match="unable to open"):
        runner.run(tmp_path / "none.sqlite", "SELECT 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "predicted, gold, unordered, ordered",
    [
        ([], [], True, True),
        ([(1,)], [], False, False),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([("a", 1), ("b", 2)], [(1, "a"), (2, "b")], True, True),
        ([("a", 1), ("b", 2)], [(2, "b"), (1, "a")], True, False),
        ([("a", 1), ("b", 2)], [(2, "a"), (1, "b")], False, False),
        ([(1, 1), (2, 2)], [(1,), (2,)], False, False),
        # each column has the same values, and yet no order of the columns makes the rows the same
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(1, 2, 3), (2, 1, 3), (3, 3, 3)], False, False),
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(3, 1, 2), (1, 2, 3), (2, 3, 1)], True, True),
        ([(1.0, None)], [(None, 1)], True, True),
        # a search through all orders of the columns would take longer than the universe is old
        ([(0,) * 30], [(0,) * 30], True, True),
        ([(0,) * 30], [(0,) * 29 + (1,)], False, False),
    ],
)
def test_same_result_is_a_bag_of_rows_in_any_order_of_columns(predicted, gold, unordered, ordered):
    assert same_result(predicted, gold, ordered=False) == unordered
    assert same_result(gold, predicted, ordered=False) == unordered
    assert same_result(predicted, gold, ordered=True) == ordered

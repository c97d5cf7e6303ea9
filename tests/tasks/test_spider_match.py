import json
from collections import Counter

import pytest

from ssmtune.tasks.spider.grammar import Column, Condition, Conditions, Query, Term, UnreadableQuery, parse
from ssmtune.tasks.spider.match import LEVELS, exact_match, hardness
from ssmtune.tasks.spider.schema import Schema, read_schemas

SCHEMA = Schema(
    tables={
        "singer": ("singer_id", "name", "age", "country"),
        "concert": ("id", "singer_id", "year"),
        "stadium": ("id", "capacity"),
    },
    canonical={"singer.singer_id": "singer.singer_id", "concert.singer_id": "singer.singer_id"},
    text="",
)
JOIN = "singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id"


@pytest.mark.parametrize(
    "predicted, gold",
    [
        ("select NAME from Singer", "SELECT name FROM singer;"),
        ("SELECT age, name FROM singer", "SELECT name, age FROM singer"),
        ("SELECT T1.name FROM singer AS T1", "SELECT name FROM singer"),
        ("SELECT DISTINCT name FROM singer", "SELECT name FROM singer"),
        ("SELECT name FROM singer WHERE age > 5", "SELECT name FROM singer WHERE age > 50"),
        ("SELECT name FROM singer WHERE country = 'US'", 'SELECT name FROM singer WHERE country = "France"'),
        ("SELECT a.name FROM concert AS b JOIN singer AS a ON b.singer_id = a.age", f"SELECT T1.name FROM {JOIN}"),
        # by the foreign key the same column
        (f"SELECT T2.singer_id FROM {JOIN}", f"SELECT T1.singer_id FROM {JOIN}"),
        # JOIN conditions are not compared, only their tables
        (f"SELECT T1.name FROM {JOIN}", "SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.age = T2.year"),
        ("SELECT name FROM singer WHERE age > 5 AND country = 'x'", 
         "SELECT name FROM singer WHERE country = 'y' AND age > 1"),
        ("SELECT name FROM singer ORDER BY age LIMIT 1", "SELECT name FROM singer ORDER BY age ASC LIMIT 3"),
        (f"SELECT count(*) FROM {JOIN} GROUP BY T1.singer_id", f"SELECT count(*) FROM {JOIN} GROUP BY T2.singer_id"),
    ],
)  # fmt: skip
def test_exact_match_of_the_same_clauses(predicted, gold):
    assert exact_match(predicted, gold, SCHEMA) and exact_match(gold, predicted, SCHEMA)


@pytest.mark.parametrize(
    "predicted, gold",
    [
        ("SELECT age FROM singer", "SELECT name FROM singer"),
        ("SELECT name, name FROM singer", "SELECT name FROM singer"),
        ("SELECT max(age) FROM singer", "SELECT min(age) FROM singer"),
        ("SELECT name FROM singer WHERE age > 5", "SELECT name FROM singer WHERE age >= 5"),
        ("SELECT name FROM singer WHERE age > 5", "SELECT name FROM singer"),
        ("SELECT name FROM singer WHERE name NOT LIKE 'a'", "SELECT name FROM singer WHERE name LIKE 'a'"),
        ("SELECT name FROM singer WHERE age > 5 OR age < 3", "SELECT name FROM singer WHERE age > 5 AND age < 3"),
        ("SELECT name FROM singer ORDER BY age DESC", "SELECT name FROM singer ORDER BY age"),
        ("SELECT name FROM singer ORDER BY age LIMIT 1", "SELECT name FROM singer ORDER BY age"),
        ("SELECT name FROM singer ORDER BY age, name", "SELECT name FROM singer ORDER BY name, age"),
        ("SELECT country FROM singer GROUP BY country", "SELECT country FROM singer"),
        ("SELECT country FROM singer GROUP BY country HAVING count(*) > 1",
         "SELECT country FROM singer GROUP BY country"),
        ("SELECT country FROM singer GROUP BY country HAVING count(*) > 1",
         "SELECT country FROM singer GROUP BY country HAVING avg(age) > 1"),
        ("SELECT singer_id FROM singer", "SELECT singer_id FROM concert"),
        ("SELECT name FROM singer UNION SELECT name FROM singer",
         "SELECT name FROM singer INTERSECT SELECT name FROM singer"),
        ("SELECT name FROM singer EXCEPT SELECT name FROM singer WHERE age > 1",
         "SELECT name FROM singer EXCEPT SELECT name FROM singer WHERE age < 1"),
        ("SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer)",
         "SELECT name FROM singer WHERE age > (SELECT max(age) FROM singer)"),
        # a nested query is compared as it is, not as a set
        ("SELECT name FROM singer WHERE age IN (SELECT DISTINCT age FROM singer)",
         "SELECT name FROM singer WHERE age IN (SELECT age FROM singer)"),
    ],
)  # fmt: skip
def test_no_exact_match_of_other_clauses(predicted, gold):
    assert exact_match(predicted, predicted, SCHEMA) and exact_match(gold, gold, SCHEMA)
    assert not exact_match(predicted, gold, SCHEMA) and not exact_match(gold, predicted, SCHEMA)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SELECT",
        "SELECT name",
        "SELECT name FROM",
        "SELECT height FROM singer",
        "SELECT name FROM band",
        "SELECT name FROM singer WHERE",
        "SELECT name FROM singer WHERE age",
        "SELECT name FROM singer WHERE age > ",
        "SELECT name FROM singer WHERE age > 1e",
        "SELECT name FROM singer WHERE name = 'it",
        "SELECT name FROM singer ORDER age",
        "SELECT name FROM singer LIMIT many",
        "SELECT count(name FROM singer",
        "SELECT name age FROM singer",
        "SELECT name FROM singer s WHERE s.age > 1",
        "SELECT name FROM singer LEFT JOIN concert ON singer.singer_id = concert.singer_id",
        "SELECT name FROM singer ORDER BY age LIMIT 3 OFFSET 1",
        "SELECT name FROM singer WHERE age IN (1, 2)",
        "SELECT a.b.c FROM singer",
        "(((",
        "as",
        "select from from from as",
        "\x00 \U0001f600",
    ],
)
def test_what_cannot_be_read_matches_nothing(sql):
    assert not exact_match(sql, "SELECT name FROM singer", SCHEMA)
    with pytest.raises(UnreadableQuery):
        exact_match("SELECT name FROM singer", sql, SCHEMA)


@pytest.mark.parametrize(
    "level, sql",
    [
        ("easy", "SELECT count(*) FROM singer"),
        ("easy", "SELECT name FROM singer WHERE age > 5"),
        ("easy", f"SELECT T1.name FROM {JOIN}"),
        ("medium", "SELECT name, age FROM singer"),
        ("medium", f"SELECT T1.name FROM {JOIN} WHERE T1.age > 3"),
        ("medium", "SELECT name FROM singer ORDER BY age LIMIT 1"),
        ("medium", "SELECT name FROM singer WHERE age > 5 AND age < 9"),
        ("medium", "SELECT name, age FROM singer WHERE age > 5 AND age < 9"),
        ("hard", "SELECT country FROM singer GROUP BY country ORDER BY count(*) LIMIT 1"),
        ("hard", "SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer)"),
        ("hard", "SELECT name FROM singer EXCEPT SELECT name FROM singer"),
        ("extra", "SELECT name, age FROM singer WHERE age > (SELECT avg(age) FROM singer)"),
        ("extra", f"SELECT T1.name FROM {JOIN} WHERE T1.age > 3 GROUP BY T1.name ORDER BY count(*) LIMIT 1"),
    ],
)
def test_hardness_counts_clauses(level, sql):
    assert hardness(sql, SCHEMA) == level


def test_parse_keeps_the_whole_query():
    sql = (
        "SELECT T1.name, count(DISTINCT T2.year) FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id "
        "WHERE T1.age - T2.year NOT BETWEEN -1 AND 2.5 OR T1.name = 'Bo' GROUP BY T1.name HAVING max(T1.age) > 3 "
        "ORDER BY T2.year DESC LIMIT 4"
    )
    name, age, year = Column("", "singer.name"), Column("", "singer.age"), Column("", "concert.year")
    joined = Condition(False, "=", Term("", Column("", "singer.singer_id")), Column("", "concert.singer_id"))
    assert parse(sql, SCHEMA) == Query(
        select=(("", Term("", name)), ("count", Term("", Column("", "concert.year", distinct=True)))),
        distinct=False,
        tables=("singer", "concert"),
        on=Conditions((joined,)),
        where=Conditions(
            (
                Condition(True, "between", Term("-", age, year), -1.0, 2.5),
                Condition(False, "=", Term("", name), '"Bo"'),
            ),
            ("or",),
        ),
        group_by=(name,),
        having=Conditions((Condition(False, ">", Term("", Column("max", "singer.age")), 3.0),)),
        order_by=(Term("", year),),
        direction="desc",
        limit=4,
    )


# The release has every query as the official program reads it: lists with numbers for names and words.
OFFICIAL_AGGREGATES = ("", "max", "min", "count", "sum", "avg")
OFFICIAL_COMPARISONS = ("not", "between", "=", ">", "<", ">=", "<=", "!=", "in", "like", "is", "exists")
OFFICIAL_OPERATORS = ("", "-", "+", "*", "/")


class Official:
    """Trees of the official program as ours, for one database."""

    def __init__(self, entry):
        self.tables = [table.lower() for table in entry["table_names_original"]]
        self.columns = [
            f"{self.tables[table]}.{column.lower()}" if table >= 0 else column
            for table, column in entry["column_names_original"]
        ]

    def column(self, unit):
        return unit and Column(OFFICIAL_AGGREGATES[unit[0]], self.columns[unit[1]], unit[2])

    def term(self, unit):
        return Term(OFFICIAL_OPERATORS[unit[0]], self.column(unit[1]), self.column(unit[2]))

    def value(self, value):
        if isinstance(value, dict):
            return self.query(value)
        return self.column(value) if isinstance(value, list) else value

    def conditions(self, units):
        found = (
            Condition(negated, OFFICIAL_COMPARISONS[word], self.term(unit), self.value(first), self.value(second))
            for negated, word, unit, first, second in units[::2]
        )
        return Conditions(tuple(found), tuple(units[1::2]))

    def query(self, sql):
        if sql is None:
            return None
        direction, order_by = sql["orderBy"] or ("", [])
        return Query(
            select=tuple((OFFICIAL_AGGREGATES[aggregate], self.term(unit)) for aggregate, unit in sql["select"][1]),
            distinct=sql["select"][0],
            tables=tuple(
                self.query(table) if kind == "sql" else self.tables[table] for kind, table in sql["from"]["table_units"]
            ),
            on=self.conditions(sql["from"]["conds"]),
            where=self.conditions(sql["where"]),
            group_by=tuple(map(self.column, sql["groupBy"])),
            having=self.conditions(sql["having"]),
            order_by=tuple(map(self.term, order_by)),
            direction=direction,
            limit=sql["limit"],
            intersect=self.query(sql["intersect"]),
            union=self.query(sql["union"]),
            except_=self.query(sql["except"]),
        )


def test_parse_reads_the_dev_set_as_the_official_program_does(released):
    tables = released / "spider" / "tables.json"
    schemas = read_schemas(tables)
    official = {entry["db_id"]: Official(entry) for entry in json.loads(tables.read_text())}
    levels = Counter()
    for entry in json.loads((released / "spider" / "dev.json").read_text()):
        name, query = entry["db_id"], entry["query"]
        assert parse(query, schemas[name]) == official[name].query(entry["sql"]), query
        assert exact_match(query, query, schemas[name])
        levels[hardness(query, schemas[name])] += 1
    # as published with the results of every system
    assert [levels[level] for level in LEVELS] == [248, 446, 174, 166]

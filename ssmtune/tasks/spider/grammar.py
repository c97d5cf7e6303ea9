"""SQL of Spider's grammar as a tree that two queries can be compared by.

The grammar is that of the official evaluation: SELECT with joins, nested queries, one arithmetic operator per term,
GROUP BY, HAVING, ORDER BY, LIMIT and a set operation. SQL beyond it (outer joins, CASE, IN lists, aliases without AS)
runs, but matches no query.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, Union

from ssmtune.tasks.spider.schema import Schema

AGGREGATES = ("max", "min", "count", "sum", "avg")
COMPARISONS = ("=", ">", "<", ">=", "<=", "!=", "in", "like", "between", "is")
ARITHMETIC = ("+", "-", "*", "/")
SET_OPERATIONS = ("intersect", "union", "except")
AFTER_VALUE = (",", ")", "and", "join", "on", "as", "where", "group", "order", "limit", *SET_OPERATIONS)
# a name may hold a dot, start with a digit, and end in a star
TOKEN = re.compile(r"""\s*("[^"]*"|'[^']*'|\w+(?:\.(?:\w+|\*))?|[<>!]=|[-+*/(),;=<>])""")


class UnreadableQuery(ValueError):
    """SQL outside Spider's grammar, or with names that its schema lacks."""


class Column(NamedTuple):
    """A column ("table.column" or "*") with its aggregate ("" for none)."""

    aggregate: str
    name: str
    distinct: bool = False


class Term(NamedTuple):
    """A column, or two with an operator between."""

    operator: str
    left: Column
    right: Column | None = None


T = TypeVar("T")
Value = Union["Query", Column, str, float, None]


class Condition(NamedTuple):
    """`term [not] comparison value`, with a second value after BETWEEN."""

    negated: bool
    comparison: str
    term: Term
    value: Value
    second: Value = None


class Conditions(NamedTuple):
    """Conditions and the words ("and", "or") between them."""

    units: tuple[Condition, ...] = ()
    connectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """One SELECT; `select` has an aggregate ("" for none) with each term."""

    select: tuple[tuple[str, Term], ...]
    distinct: bool
    tables: tuple[str | Query, ...]
    on: Conditions = Conditions()
    where: Conditions = Conditions()
    group_by: tuple[Column, ...] = ()
    having: Conditions = Conditions()
    order_by: tuple[Term, ...] = ()
    direction: str = ""
    limit: int | None = None
    intersect: Query | None = None
    union: Query | None = None
    except_: Query | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return self.on.units + self.where.units + self.having.units

    @property
    def connectives(self) -> tuple[str, ...]:
        return self.on.connectives + self.where.connectives + self.having.connectives

    @property
    def operands(self) -> tuple[Query | None, ...]:
        """The right-hand sides of the set operations."""
        return self.intersect, self.union, self.except_


def parse(sql: str, schema: Schema) -> Query:
    """The tree of a query.

    Raises:
        UnreadableQuery: it is outside the grammar, or names what is not in the schema.
    """
    parser = _Parser(_tokens(sql), schema)
    query = parser.query()
    if parser.next:
        raise UnreadableQuery(f"{parser.next!r} comes after the end of the query")
    return query


def _tokens(sql: str) -> list[str]:
    tokens, at = [], 0
    sql = sql.rstrip()
    while at < len(sql):
        match = TOKEN.match(sql, at)
        if match is None:
            raise UnreadableQuery(f"{sql[at : at + 10]!r} is no part of a query")
        token, at = match[1], match.end()
        # all strings in the same quotes; all else in lower case
        tokens.append(f'"{token[1:-1]}"' if token[0] in "\"'" else token.lower())
    return tokens


class _Parser:
    """Recursive descent over tokens; `at` is the next one."""

    def __init__(self, tokens: list[str], schema: Schema):
        self.tokens, self.schema, self.at = tokens, schema, 0
        # aliases hold for the whole text, the last of a name for all its uses, as in the official evaluation
        self.aliases = {table: table for table in schema.tables}
        for number, token in enumerate(tokens[1:-1], start=1):
            if token == "as":
                self.aliases[tokens[number + 1]] = tokens[number - 1]

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        found = self.next == token
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise UnreadableQuery(f"expected {token!r}, got {self.next!r}")

    def query(self) -> Query:
        bracket = self.accept("(")
        self.expect("select")
        start = self.at
        if "from" not in self.tokens[start:]:
            raise UnreadableQuery("there is no FROM")
        # the tables first: columns without a table's name are looked up in them
        self.at = source = self.tokens.index("from", start)
        tables, on, scope = self._from()
        end, self.at = self.at, start
        distinct = self.accept("distinct")
        select = self._listed(self._selected, scope)
        if self.at != source:
            raise UnreadableQuery(f"{self.next!r} is no part of SELECT")
        self.at = end
        where = self._conditions(scope) if self.accept("where") else Conditions()
        group_by = self._listed(self._column, scope) if self._by("group") else ()
        having = self._conditions(scope) if self.accept("having") else Conditions()
        order_by, direction = self._order(scope) if self._by("order") else ((), "")
        limit = self._limit() if self.accept("limit") else None
        self.accept(";")
        if bracket:
            self.expect(")")
            self.accept(";")
        operands = {}
        if self.next in SET_OPERATIONS:
            operation = self.take()
            operands["except_" if operation == "except" else operation] = self.query()
        return Query(select, distinct, tables, on, where, group_by, having, order_by, direction, limit, **operands)

    def _by(self, word: str) -> bool:
        found = self.accept(word)
        if found:
            self.expect("by")
        return found

    def _listed(self, item: Callable[[list[str]], T], scope: list[str]) -> tuple[T, ...]:
        items = [item(scope)]
        while self.accept(","):
            items.append(item(scope))
        return tuple(items)

    def _from(self) -> tuple[tuple[str | Query, ...], Conditions, list[str]]:
        self.expect("from")
        tables: list[str | Query] = []
        on, scope = Conditions(), []
        while True:
            bracket = self.accept("(")
            if self.next == "select":
                tables.append(self.query())
            else:
                table = self._table(self.take())
                tables.append(table)
                scope.append(table)
                if self.accept("as"):
                    self.take()
            if bracket:
                self.expect(")")
            if self.accept("on"):
                more = self._conditions(scope)
                between = ("and",) if on.units else ()
                on = Conditions(on.units + more.units, on.connectives + between + more.connectives)
            if not self.accept("join"):
                return tuple(tables), on, scope

    def _table(self, name: str) -> str:
        table = self.aliases.get(name)
        if table not in self.schema.tables:
            raise UnreadableQuery(f"there is no table {name!r}")
        return table

    def _selected(self, scope: list[str]) -> tuple[str, Term]:
        aggregate = self.take() if self.next in AGGREGATES else ""
        return aggregate, self._term(scope)

    def _term(self, scope: list[str]) -> Term:
        bracket = self.accept("(")
        left, operator, right = self._column(scope), "", None
        if self.next in ARITHMETIC:
            operator, right = self.take(), self._column(scope)
        if bracket:
            self.expect(")")
        return Term(operator, left, right)

    def _column(self, scope: list[str]) -> Column:
        bracket = self.accept("(")
        if self.next in AGGREGATES:
            aggregate = self.take()
            self.expect("(")
            column = Column(aggregate, distinct=self.accept("distinct"), name=self._name(scope))
            self.expect(")")
        else:
            column = Column("", distinct=self.accept("distinct"), name=self._name(scope))
        if bracket:
            self.expect(")")
        return column

    def _name(self, scope: list[str]) -> str:
        token = self.take()
        if token == "*":
            return token
        table, dot, column = token.partition(".")
        owners = [self._table(table)] if dot else scope
        for owner in owners:
            if (column if dot else token) in self.schema.tables[owner]:
                return f"{owner}.{column if dot else token}"
        raise UnreadableQuery(f"there is no column {token!r}")

    def _conditions(self, scope: list[str]) -> Conditions:
        units, connectives = [self._condition(scope)], []
        while self.next in ("and", "or"):
            connectives.append(self.take())
            units.append(self._condition(scope))
        return Conditions(tuple(units), tuple(connectives))

    def _condition(self, scope: list[str]) -> Condition:
        term = self._term(scope)
        negated = self.accept("not")
        comparison = self.take()
        if comparison not in COMPARISONS:
            raise UnreadableQuery(f"{comparison!r} compares nothing")
        value, second = self._value(scope), None
        if comparison == "between":
            self.expect("and")
            second = self._value(scope)
        return Condition(negated, comparison, term, value, second)

    def _value(self, scope: list[str]) -> Value:
        bracket = self.accept("(")
        if self.next == "select":
            value: Value = self.query()
        elif self.next.startswith('"'):
            value = self.take()
        elif self.next == "-" or self.next[:1].isdigit():
            value = self._number()
        else:
            value = self._column(scope)
            # the official program passes over what follows a column here, even an OR with its condition
            while self.next and self.next not in AFTER_VALUE:
                self.take()
        if bracket:
            self.expect(")")
        return value

    def _number(self) -> float:
        text = "-" * self.accept("-") + self.take()
        try:
            return float(text)
        except ValueError:
            raise UnreadableQuery(f"{text!r} is no number") from None

    def _order(self, scope: list[str]) -> tuple[tuple[Term, ...], str]:
        terms, direction = [], "asc"
        while True:
            terms.append(self._term(scope))
            # one direction stands for all terms: the last that is given
            if self.next in ("asc", "desc"):
                direction = self.take()
            if not self.accept(","):
                return tuple(terms), direction

    def _limit(self) -> int:
        text = self.take()
        if not text.isdigit():
            raise UnreadableQuery(f"the limit {text!r} is no number")
        return int(text)

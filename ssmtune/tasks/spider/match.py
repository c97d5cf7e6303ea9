"""Exact set match and hardness, as Spider's official evaluation defines them (Yu et al., EMNLP 2018).

Clauses are compared as sets of their parts, without literal values, without DISTINCT, and with columns that a foreign
key makes equal taken for the same. Oddities of the official program are kept, since published numbers have them; a
comment names each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ssmtune.tasks.spider.grammar import Column, Conditions, Query, Term, UnreadableQuery, Value, parse
from ssmtune.tasks.spider.schema import Schema

LEVELS = ("easy", "medium", "hard", "extra")


def exact_match(predicted: str, gold: str, schema: Schema) -> bool:
    """Whether every clause of two queries is the same set of parts.

    A prediction outside Spider's grammar matches nothing.

    Raises:
        UnreadableQuery: `gold` is outside the grammar.
    """
    reference = _normal(parse(gold, schema), schema)
    try:
        query = parse(predicted, schema)
    except UnreadableQuery:
        return False
    return _same(_normal(query, schema), reference)


def hardness(gold: str, schema: Schema) -> str:
    """One of LEVELS, by the numbers of clauses, nested queries and further parts.

    Raises:
        UnreadableQuery: `gold` is outside the grammar.
    """
    query = parse(gold, schema)
    clauses = sum(map(bool, (query.where.units, query.group_by, query.order_by, query.limit is not None)))
    clauses += len(query.tables) - 1 + query.connectives.count("or")
    clauses += sum(unit.comparison == "like" for unit in query.conditions)
    nested = sum(isinstance(value, Query) for unit in query.conditions for value in (unit.value, unit.second))
    nested += sum(operand is not None for operand in query.operands)
    aggregates = sum(bool(aggregate) for aggregate, _ in query.select)
    aggregates += sum(bool(column.aggregate) for column in query.group_by)
    aggregates += sum(bool(column.aggregate) for term in query.order_by for column in _columns(term))
    # the official count takes a NOT of WHERE and HAVING, and each AND and OR of HAVING, for an aggregate
    aggregates += sum(unit.negated for unit in query.where.units + query.having.units) + len(query.having.connectives)
    more = sum((aggregates > 1, len(query.select) > 1, len(query.where.units) > 1, len(query.group_by) > 1))
    if nested:
        return "hard" if nested == 1 and clauses <= 1 and more == 0 else "extra"
    if clauses <= 1 and more == 0:
        return "easy"
    if clauses <= 1 and more <= 2 or clauses <= 2 and more < 2:
        return "medium"
    if clauses <= 2 and more > 2 or clauses == 3 and more <= 2:
        return "hard"
    return "extra"


def _same(predicted: Query, gold: Query) -> bool:
    return (
        Counter(predicted.select) == Counter(gold.select)
        and Counter(predicted.where.units) == Counter(gold.where.units)
        and set(predicted.where.connectives) == set(gold.where.connectives)
        and Counter(_bare(predicted.group_by)) == Counter(_bare(gold.group_by))
        and _same_having(predicted, gold)
        and (predicted.order_by, predicted.direction) == (gold.order_by, gold.direction)
        and _keywords(predicted) == _keywords(gold)
        and all(map(_same_operand, predicted.operands, gold.operands))
        and Counter(predicted.tables) == Counter(gold.tables)
    )


def _same_operand(predicted: Query | None, gold: Query | None) -> bool:
    if predicted is None or gold is None:
        return predicted is gold
    return _same(predicted, gold)


def _same_having(predicted: Query, gold: Query) -> bool:
    """Without GROUP BY its presence alone counts, among the keywords; with it, columns must be in the same order."""
    if not gold.group_by:
        return True
    return _names(predicted.group_by) == _names(gold.group_by) and predicted.having == gold.having


def _names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


def _bare(columns: Iterable[Column]) -> list[str]:
    return [name.rpartition(".")[2] for name in _names(columns)]


def _columns(term: Term) -> list[Column]:
    return [term.left] if term.right is None else [term.left, term.right]


def _keywords(query: Query) -> set[str]:
    present = {
        "where": query.where.units,
        "group": query.group_by,
        "having": query.having.units,
        "order": query.order_by,
        "limit": query.limit is not None,
        "or": "or" in query.connectives,
        "intersect": query.intersect,
        "union": query.union,
        "except": query.except_,
        "not": any(unit.negated for unit in query.conditions),
    }
    compared = {unit.comparison for unit in query.conditions} & {"in", "like"}
    return {word for word, found in present.items() if found} | compared


def _normal(query: Query, schema: Schema) -> Query:
    tables = {table for table in query.tables if isinstance(table, str)}
    known = {column: first for column, first in schema.canonical.items() if column.partition(".")[0] in tables}
    return _canonical(_without_values(query), known)


def _without_values(query: Query) -> Query:
    """Literals and columns on the right of comparisons become nothing, but not in a nested query of FROM."""

    def strip(conditions: Conditions) -> Conditions:
        return conditions._replace(
            units=tuple(
                unit._replace(value=_nested(unit.value), second=_nested(unit.second)) for unit in conditions.units
            )
        )

    return replace(
        query,
        on=strip(query.on),
        where=strip(query.where),
        having=strip(query.having),
        **_operands(query, _without_values),
    )


def _nested(value: Value) -> Query | None:
    return _without_values(value) if isinstance(value, Query) else None


def _canonical(query: Query, known: Mapping[str, str]) -> Query:
    """One column for all that are equal by a foreign key, and no DISTINCT.

    `known` are the columns of the outermost query's tables, also for the operands of set operations, and nested
    queries in conditions stay as they are.
    """

    def column(old: Column) -> Column:
        return Column(old.aggregate, known.get(old.name, old.name))

    def term(old: Term) -> Term:
        return Term(old.operator, column(old.left), old.right and column(old.right))

    def conditions(old: Conditions) -> Conditions:
        return old._replace(units=tuple(unit._replace(term=term(unit.term)) for unit in old.units))

    return replace(
        query,
        distinct=False,
        select=tuple((aggregate, term(old)) for aggregate, old in query.select),
        on=conditions(query.on),
        where=conditions(query.where),
        having=conditions(query.having),
        group_by=tuple(map(column, query.group_by)),
        order_by=tuple(map(term, query.order_by)),
        **_operands(query, lambda operand: _canonical(operand, known)),
    )


def _operands(query: Query, change) -> dict[str, Query | None]:
    names = ("intersect", "union", "except_")
    return {name: operand and change(operand) for name, operand in zip(names, query.operands, strict=True)}

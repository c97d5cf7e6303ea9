"""The schemas of Spider's databases, from its tables.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmtune.tasks.sources import broken, read_json_list


@dataclass(frozen=True)
class Schema:
    """Tables and columns of a database, in lower case.

    Args:
        tables: table -> its columns.
        canonical: column ("table.column") -> the first column that foreign keys make it equal to.
        text: tables, columns with their types, and foreign keys, for a prompt.
    """

    tables: Mapping[str, tuple[str, ...]]
    canonical: Mapping[str, str]
    text: str


def read_schemas(path: Path) -> dict[str, Schema]:
    """Database -> schema.

    Raises:
        ValueError: the file is not JSON, or an entry lacks a key; names the entry.
    """
    schemas = {}
    for where, entry in read_json_list(path):
        try:
            schemas[entry["db_id"]] = _schema(entry)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise broken(
                f"{path}: {where} is no schema of Spider ({type(error).__name__}: {error})",
                "It needs db_id, table_names_original, column_names_original, column_types and foreign_keys",
            ) from None
    return schemas


def _schema(entry: Mapping[str, Any]) -> Schema:
    tables, columns = entry["table_names_original"], entry["column_names_original"]
    # the first of the columns is "*", of no table
    names = [f"{tables[table]}.{column}" if table >= 0 else column for table, column in columns]
    groups: list[set[int]] = []
    for key in entry["foreign_keys"]:
        # the official evaluation adds to the first group that it finds, and never joins two
        group = next((group for group in groups if group & set(key)), None)
        if group is None:
            groups.append(group := set())
        group |= set(key)
    texts = []
    for number, table in enumerate(tables):
        typed = zip(columns, entry["column_types"], strict=True)
        texts.append(f"{table}({', '.join(f'{column} {kind}' for (owner, column), kind in typed if owner == number)})")
    text = f"Tables: {'; '.join(texts)}."
    if entry["foreign_keys"]:
        text += f"\nKeys: {', '.join(f'{names[left]} = {names[right]}' for left, right in entry['foreign_keys'])}."
    return Schema(
        tables={
            table.lower(): tuple(column.lower() for owner, column in columns if owner == number)
            for number, table in enumerate(tables)
        },
        canonical={names[column].lower(): names[min(group)].lower() for group in groups for column in group},
        text=text,
    )

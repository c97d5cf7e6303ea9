"""Sets of (subject, relation, object) and the texts that say them, as WebNLG and DART publish them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ssmtune.data import Example
from ssmtune.tasks.sources import EMPTY, broken, read_text

Triple = tuple[str, str, str]


class Entry(NamedTuple):
    """A set of triples, its texts and its category."""

    triples: list[Triple]
    texts: list[str]
    category: str = ""


def read_xml(path: Path) -> Iterator[Entry]:
    """The entries of a file in WebNLG's format: modifiedtripleset and lex.

    Raises:
        ValueError: the file is not XML, naming the line; there are no entries, or one has no triples, naming it.
    """
    try:
        root = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise broken(
            f"{path}: line {line} is not valid XML ({error.msg.split(':')[0]} at column {column})",
            "The file may have been cut short while it was copied",
        ) from None
    if root.find(".//entry") is None:
        raise broken(f"{path} has no entries", EMPTY)
    for number, entry in enumerate(root.iter("entry"), start=1):
        where = f"{path}: entry {number} ({entry.get('category')} {entry.get('eid')})"
        triples = [(node.text or "").split(" | ") for node in entry.iterfind("modifiedtripleset/mtriple")]
        yield checked(where, triples, [node.text or "" for node in entry.iterfind("lex")], entry.get("category", ""))


def checked(where: str, triples: list, texts: list[str], category: str = "") -> Entry:
    """The entry with empty texts left out.

    Raises:
        ValueError: there are no triples, or one has not three parts.
    """
    if not triples:
        raise broken(f"{where} has no triples", "Each entry needs at least one")
    return Entry([_triple(where, triple) for triple in triples], [text for text in texts if text.strip()], category)


def _triple(where: str, parts: list[str]) -> Triple:
    if len(parts) != 3:
        raise broken(f"{where} has a triple of {len(parts)} parts", "A triple is a subject, a relation and an object")
    return tuple(part.strip() for part in parts)


def one_each(entries: Iterable[Entry]) -> list[Example]:
    """An example for every text: to learn from."""
    return [_example(entry.triples, [text], "") for entry in entries for text in entry.texts]


def with_references(entries: Iterable[Entry], group=lambda category: "") -> list[Example]:
    """An example for every set of triples, with all its texts as references: to measure on."""
    return [_example(entry.triples, entry.texts, group(entry.category)) for entry in entries if entry.texts]


def _example(triples: list[Triple], texts: list[str], group: str) -> Example:
    texts = [" ".join(text.split()) for text in texts]
    return Example(prompt(triples), f" {texts[0]}", tuple(texts), group)


def prompt(triples: Iterable[Triple]) -> str:
    """`(The_Mill, area, riverside)` as facts and the beginning of the answer; underscores stand for spaces."""
    facts = "; ".join(" | ".join(triple) for triple in triples)
    return f"Facts: {facts.replace('_', ' ')}. In words:"

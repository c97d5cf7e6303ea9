"""docs/capabilities.md, drawn from docs/capabilities.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models_page import cell, table

DATA = Path(__file__).parents[2] / "docs" / "capabilities.json"
PAGE = DATA.with_suffix(".md")
OUTCOMES = {"ok": "passed", "red": "known", "not applicable": "skipped"}

HEAD = """\
# Which method runs on which model

Before a comparison trains a method it checks it on the model; one that fails is a row without a score. This is what
the checks come to for every method, on small random models of each family. [capabilities.json](capabilities.json) has
it for each check. A test fails when it is no longer so; this writes both files:

    python -m pytest tests/families --write-models-md

| check | what it asks |
|---|---|
| known start | before the first step the logits are those of the base; not asked of virtual tokens, which are random |
| gradients | every trainable tensor gets one |
| cached generation | token by token from the cache the logits are those without it |
| left padding | after pads on the left the logits of generated tokens are those without pads |
| save and load | stored, and loaded onto the base, the logits are the same |

The last three are asked with noise in what is trained. ✓ every check that applies holds, – the method does not apply,
✗ a check fails; the small numbers are those of the notes below. Which methods apply is read from the model: other
families than these are offered what fits them.
"""


def read() -> dict[str, Any]:
    """The stored matrix; an empty one where there is none yet."""
    if not DATA.is_file():
        return {"versions": {}, "families": {}}
    return json.loads(DATA.read_text(encoding="utf-8"))


def render(stored: Mapping[str, Any], methods: Iterable[str]) -> str:
    """The page, with the methods in this order."""
    families, notes = stored["families"], {}
    rows = [["method", *families]]
    for name in methods:
        found = [cells[name] for cells in families.values()]
        rows.append([f"`{name}`", *(cell(OUTCOMES[c["outcome"]], c.get("reason", ""), notes) for c in found)])
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    listed = "\n".join(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items())
    return f"{HEAD}\nFound with {versions}.\n\n{table(rows)}\n\n{listed}\n"

"""What the effects of a method are measured with: the task, and texts that are not of the task."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ssmtune.config import ConfigError
from ssmtune.data import load_examples
from ssmtune.tasks.task import Task

OWN_TEXT = Path(__file__).with_name("held_out.txt")
PROMPTS = 64


@dataclass
class Context:
    """Shared by all runs on one task, and kept from one to the next.

    Args:
        base: the model without any method, left as it is.
        text: held-out text of the kind that the base has learnt from.
        other: another task, whose prompts are the ones not of this task; pieces of `text` where there is none.
    """

    task: Task
    base: nn.Module
    tokenizer: Any
    text: str
    other: Task | None = None
    _numbers: dict[str, float] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> list[int]:
        """The text as tokens."""
        return self.tokenizer(self.text, add_special_tokens=False)["input_ids"]

    @cached_property
    def inside(self) -> list[str]:
        """Prompts of the task."""
        return [example.prompt for example in self.task.test[:PROMPTS]]

    @cached_property
    def outside(self) -> list[str]:
        """Prompts that are not of the task, in the frame that all prompts of the task have in common.

        Without the frame a model could tell them by that alone.
        """
        if self.other is not None:
            return [example.prompt for example in self.other.test[:PROMPTS]]
        begin = os.path.commonprefix(self.inside)
        end = os.path.commonprefix([prompt[len(begin) :][::-1] for prompt in self.inside])[::-1]
        lengths = sorted(len(prompt[len(begin) : len(prompt) - len(end)].split()) for prompt in self.inside)
        words, size = self.text.split(), max(1, lengths[len(lengths) // 2])
        pieces = [words[start : start + size] for start in range(0, len(words) - size + 1, size)]
        return [begin + " ".join(piece) + end for piece in pieces[:PROMPTS]]

    def remembered(self, name: str, compute: Callable[[], float]) -> float:
        """A number of the base, computed once."""
        if name not in self._numbers:
            self._numbers[name] = compute()
        return self._numbers[name]

    def fingerprint(self) -> str:
        """A hash of the texts."""
        other = self.other.fingerprint() if self.other is not None else ""
        return hashlib.sha256(f"{self.text}\x1f{other}".encode()).hexdigest()[:16]


def read_text(path: str | None) -> str:
    """The text of a file, or of the column `text` of a JSONL file; the one that comes with ssmtune by default.

    Raises:
        ConfigError: there is no such file, or a line has no text.
    """
    file = Path(path) if path is not None else OWN_TEXT
    if not file.is_file():
        raise ConfigError(f"--text {file} does not exist.\n  Give a file of plain text, or JSONL with a column `text`.")
    if file.suffix != ".jsonl":
        return file.read_text(encoding="utf-8")
    return "\n\n".join(example.target for example in load_examples(file, "", "text"))

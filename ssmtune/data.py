"""Examples of a prompt and a target: read from files, and made into batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, the target that follows it character for character, and further accepted targets."""

    prompt: str
    target: str
    references: tuple[str, ...] = ()

"""Why something could not be read, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


@contextmanager
def reading_files_of(what: str, folder: Path, needs: str, remedy: str) -> Iterator[None]:
    """Say in one way what is wrong with tensors that another program stored in a folder.

    Args:
        what: what the folder should be.
        folder: where it is.
        needs: the files it has to hold, and that they hold tensors alone.
        remedy: what to do.

    Raises:
        ValueError: anything was raised inside.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - safetensors, pickle, zip and JSON raise unrelated kinds
        raise ValueError(
            f"cannot read {folder} as {what}: {first_line(error)}.\n"
            f"  It has to hold {needs}: other pickles can run code.\n  {remedy}"
        ) from None

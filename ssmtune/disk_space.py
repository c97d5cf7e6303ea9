"""A full disk, told apart from what else can go wrong with a run: no other run would have room either."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class DiskFull(RuntimeError):
    """There is no room left for a result."""


@contextmanager
def room_in(out: Path) -> Iterator[None]:
    """Raise DiskFull, with what to do, where the block runs out of space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has the number in its text alone
        numbers = {getattr(error, "errno", None)} & {errno.ENOSPC, errno.EDQUOT}
        if not numbers and f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise DiskFull(
            f"no space is left for {out} or {tempfile.gettempdir()} ({error}).\n"
            "  What was finished before is stored whole.\n"
            "  Make room, then repeat the same command: it goes on from there."
        ) from error

"""Execution match: whether two queries have the same result, where one of them was written by a model."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")

Rows = list[tuple]


class FailedQuery(RuntimeError):
    """SQL that did not run, ran too long, or gave too much."""


class QueryRunner:
    """Runs queries in a child process that can only read; a context manager.

    Args:
        timeout: seconds until a query is given up and the process killed; the next query has a new one.
        max_rows, max_characters: largest result.
        max_bytes: address space of the process.
    """

    def __init__(
        self, timeout: float = 30.0, max_rows: int = 100_000, max_characters: int = 2**24, max_bytes: int = 2**30
    ):
        self.timeout = timeout
        self.limits = (max_rows, max_characters, max_bytes)
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> QueryRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, database: Path, sql: str) -> Rows:
        """The rows of a query.

        Raises:
            FailedQuery: there are none; says why.
        """
        if self.process is None:
            # isolated: the child needs nothing but the standard library
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), *map(str, self.limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        request = json.dumps({"database": str(database.absolute()), "sql": sql, "seconds": self.timeout})
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            reply = json.loads(self._line())
        except (BrokenPipeError, EOFError):
            self._stop()
            raise FailedQuery("the process that ran it ended, probably for lack of memory") from None
        except TimeoutError:
            self._stop()
            raise FailedQuery(f"no result within {self.timeout:g} s") from None
        except BaseException:
            # an interrupt: the reply would be taken for that of the next query
            self._stop()
            raise
        if "error" in reply:
            raise FailedQuery(reply["error"])
        return [tuple(row) for row in reply["rows"]]

    def _line(self) -> bytes:
        pipe, deadline, parts = self.process.stdout.fileno(), time.monotonic() + self.timeout, []
        while not parts or not parts[-1].endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(pipe, 2**16)
            if not part:
                raise EOFError
            parts.append(part)
        return b"".join(parts)

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # of a request that was not read
                self.process.stdin.close()
            self.process = None


def same_result(predicted: Rows, gold: Rows, ordered: bool) -> bool:
    """Whether two results are the same bag of rows, in any order of the columns; in the same order if `ordered`.

    The definition of the test-suite evaluation (Zhong et al., EMNLP 2020), which is Spider's official one, on one
    database. All empty results are the same.
    """
    if len(predicted) != len(gold):
        return False
    if not gold:
        return True
    mine, theirs = list(zip(*predicted, strict=True)), list(zip(*gold, strict=True))
    if ordered or len(mine) != len(theirs):
        return Counter(mine) == Counter(theirs)
    return _arrangeable(mine, theirs, [])


def _arrangeable(columns: Sequence[tuple], wanted: Sequence[tuple], chosen: list[tuple]) -> bool:
    """Whether `chosen` and some order of `columns` are the rows of `wanted`, in any order of the rows."""
    if Counter(zip(*chosen, strict=True)) != Counter(zip(*wanted[: len(chosen)], strict=True)):
        return False
    # equal columns are interchangeable: one of them is tried
    return not columns or any(
        _arrangeable([*columns[:i], *columns[i + 1 :]], wanted, [*chosen, column])
        for i, column in enumerate(columns)
        if column not in columns[:i]
    )

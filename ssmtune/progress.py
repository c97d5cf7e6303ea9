"""How work shows where it is: one line that renews itself on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any


class ProgressLine:
    """Of a run: prints step, loss, learning rate, tokens per second and the time that is left.

    It has no colours, so there is nothing for NO_COLOR to turn off.
    """

    def __init__(self, total: int, first: int = 0, enabled: bool = True):
        self.total, self.first, self.enabled = total, first, enabled
        self.started = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, leave=True)

    def step(self, step: int) -> None:
        """One more optimizer step is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, row: dict[str, Any]) -> None:
        """A line of metrics: of training, or of the dev set."""
        if "dev_loss" in row:
            self.write(f"step {row['step']}/{self.total}  dev loss {row['dev_loss']:.4f}")
            return
        text = f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_second']:,.0f} tok/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self.write(f"step {row['step']}/{self.total}  {text}  {self._left(row['step'])} left")

    def write(self, text: str) -> None:
        """Any other line, without breaking the bar."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self, step: int) -> str:
        done = max(step - self.first, 1)
        seconds = (time.monotonic() - self.started) / done * (self.total - step)
        return str(timedelta(seconds=round(seconds)))


class CountLine:
    """Of things that are done one after the other: a bar on a terminal, anywhere else a line for each tenth."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.done, self.tenths = total, unit, 0, 0
        self.bar = None

    def __enter__(self) -> CountLine:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit=self.unit, dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.done * 10 // self.total > self.tenths:
            self.tenths = self.done * 10 // self.total
            print(f"{self.unit} {self.done}/{self.total}", file=sys.stderr, flush=True)

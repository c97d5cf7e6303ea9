"""Time and memory of every step of a run."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ssmtune import memory


class StepLog(TrainerCallback):
    """Takes down how long each step took, and how much memory was in use after it."""

    def __init__(self):
        self.seconds: list[float] = []
        self.bytes: list[int] = []

    def on_step_begin(self, args, state, control, **_: Any):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any):
        self.seconds.append(time.perf_counter() - self.began)
        self.bytes.append(memory.current_bytes())

    def summary(self, peak: int) -> dict[str, Any]:
        """The median step, and memory under the names of peft's method_comparison."""
        return {
            "step_ms": float(np.median(self.seconds)) * 1e3,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_avg": int(np.mean(self.bytes)),
            "accelerator_memory_reserved_99th": int(np.percentile(self.bytes, 99)),
        }

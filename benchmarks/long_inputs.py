"""Peak memory and time of a training step on one long document, in chunks, above that of the loaded model.

python -m benchmarks.long_inputs [--quick] [--out FILE.csv]

The shipped base, one thread; at the shortest length also a step on the whole document at once.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import torch

import ssmtune.tuners  # noqa: F401  peft takes seconds to import: once, before processes are forked from this module
from benchmarks.peak_memory import peak_memory
from benchmarks.stored import write_table
from ssmtune.cli.allocator import keep_freed_memory
from ssmtune.likelihood import target_losses
from ssmtune.long_inputs import chunked_backward
from ssmtune.methods import apply_method
from ssmtune.models import load_model

METHODS = ("state-offset", "initial-state", "lora")
LENGTHS = (12_500, 25_000, 50_000, 100_000)
CHUNK = 1_000
CASES = (
    *(("state-offset", length, "exact") for length in LENGTHS),
    *((method, length, "exact") for method in METHODS[1:] for length in (LENGTHS[0], LENGTHS[-1])),
    ("state-offset", LENGTHS[0], "whole"),
    ("state-offset", LENGTHS[0], "truncated"),
)
"""Method, tokens of the document, and how its gradients come about."""


def one_step(method: str, length: int, gradients: str, chunk_length: int, seconds=None) -> Iterator[None]:
    """A step of AdamW on random tokens, all of which are learnt; `seconds` is given what it took."""
    keep_freed_memory()  # as `ssmtune train` does
    model, _ = load_model("mamba-5m")
    model = apply_method(model, method).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step(length: int) -> None:
        tokens = torch.randint(1, model.config.vocab_size, (1, length))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        if gradients == "whole":
            target_losses(model, batch).mean().backward()
        else:
            chunked_backward(model, batch, chunk_length, gradients=gradients)
        optimizer.step()

    step(16)
    yield
    start = time.perf_counter()
    step(length)
    if seconds is not None:
        seconds.value = time.perf_counter() - start


def measure(method: str, length: int, gradients: str, chunk_length: int) -> dict[str, object]:
    """One row."""
    seconds = get_context("forkserver").Value("d")
    peak = peak_memory(one_step, method, length, gradients, chunk_length, seconds)
    print(
        f"{method:<14} {length:>8} tokens  {gradients:<10} {peak / 2**20:8.1f} MiB {seconds.value:7.1f} s", flush=True
    )
    row = {"method": method, "length": length, "gradients": gradients, "chunk_length": chunk_length, "bytes": peak}
    row |= {"seconds": f"{seconds.value:.1f}", "threads": 1}
    return row | {"machine": platform.machine(), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of each length, to see that it runs")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS, help="these alone")
    parser.add_argument("--out", type=Path, help="write the rows as CSV too")
    args = parser.parse_args()
    scale = 100 if args.quick else 1
    cases = [case for case in CASES if case[0] in args.method]
    rows = [measure(method, length // scale, gradients, CHUNK // scale) for method, length, gradients in cases]
    if args.out is not None:
        write_table(args.out, rows)


if __name__ == "__main__":
    main()

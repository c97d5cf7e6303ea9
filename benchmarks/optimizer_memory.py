"""Peak memory of a training step with AdamW and with MeZO, above that of the loaded model.

python -m benchmarks.optimizer_memory [--out FILE.csv]
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.peak_memory import peak_memory
from benchmarks.stored import write_table

METHODS = ("full", "lora", "state-offset")
OPTIMIZERS = ("inference", "mezo", "adamw")
BATCH, LENGTH = 8, 512


def one_step(method: str, optimizer: str, batch: int, length: int) -> Iterator[None]:
    """A step of the shipped base on random tokens, or its forward pass alone."""
    from ssmtune.methods import apply_method
    from ssmtune.mezo import MeZO
    from ssmtune.models import load_model

    model, _ = load_model("mamba-5m")
    model = apply_method(model, method).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(length: int) -> torch.Tensor:
        tokens = torch.randint(0, 1000, (batch, length))
        # As in training: logits of a few positions, since those of all would hide everything else.
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=torch.arange(length - 16, length)).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -16:].flatten())

    with torch.no_grad():
        loss(16)
    yield
    if optimizer == "inference":
        with torch.no_grad():
            loss(length)
    elif optimizer == "mezo":
        step = MeZO(parameters, lr=1e-6)
        step.estimate(lambda: loss(length))
        step.step()
    else:
        step = torch.optim.AdamW(parameters)
        loss(length).backward()
        step.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as CSV too")
    args = parser.parse_args()
    rows = [
        # The smallest of two: what the allocator keeps of the warm-up is by chance.
        {
            "method": method,
            "optimizer": name,
            "bytes": min(peak_memory(one_step, method, name, BATCH, LENGTH) for _ in range(2)),
        }
        for method in METHODS
        for name in OPTIMIZERS
    ]
    for row in rows:
        row |= {"batch": BATCH, "length": LENGTH, "machine": platform.machine(), "torch": torch.__version__}
        print(f"{row['method']:<14} {row['optimizer']:<10} {row['bytes'] / 2**20:8.1f} MiB")
    if args.out is not None:
        write_table(args.out, rows)


if __name__ == "__main__":
    main()

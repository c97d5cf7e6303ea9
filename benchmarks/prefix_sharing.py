"""Two answers behind one prompt: forward and backward with the prompt run once, against repeating it for each answer.

python -m benchmarks.prefix_sharing [--quick] [--out FILE.csv]

Every gradient of the one is first compared with that of the other, then both are timed in turns: CPU time of a thread.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stored import write_table
from ssmtune.cli.allocator import keep_freed_memory
from ssmtune.likelihood import logits_at
from ssmtune.measure.timing import Lap, Verified, error, interleave, laps
from ssmtune.methods import apply_method
from ssmtune.mixers import find_mixers, patch
from ssmtune.prefix_sharing import shared_prefix_logits

WAYS = ("repeated", "shared")
CASES = (
    ("Mamba", "full"),
    ("Mamba", "state-offset"),
    ("Mamba2", "full"),
    ("GPTNeoX", "full"),
    ("Llama", "full"),
)
BATCH, PROMPT, ANSWER, ANSWERS = 2, 1024, 128, 2
VOCABULARY = 1024
LARGEST_ERROR = 1e-4
"""RMS(difference) / RMS of a gradient, float32 sums of two thousand tokens in another order."""


def build(architecture: str, method: str, width: int, layers: int) -> nn.Module:
    """A random model of transformers in training mode, by what stands in front of `ForCausalLM`."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    if architecture == "Mamba2":
        sizes |= {"head_dim": 32, "num_heads": width // 16, "state_size": 64, "n_groups": 1}
    elif architecture != "Mamba":
        sizes |= {"intermediate_size": 4 * width, "num_attention_heads": width // 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    if find_mixers(model):
        patch(model)
    return apply_method(model, method).train()


def repeated_prefix_logits(model: nn.Module, prompt_ids: Tensor, continuation_ids: Tensor) -> Tensor:
    """What `shared_prefix_logits` gives, by a row for each continuation with the whole prompt in it."""
    batch, n, length = continuation_ids.shape
    prompt = prompt_ids.shape[1]
    rows = torch.cat([prompt_ids.repeat_interleave(n, dim=0), continuation_ids.flatten(0, 1)], dim=1)
    logits = logits_at(model, torch.arange(prompt - 1, prompt + length - 1), input_ids=rows, use_cache=False)
    return logits.unflatten(0, (batch, n))


class Case:
    """One way to train on two answers."""

    stages = ("fwd", "bwd")

    def __init__(self, model: nn.Module, way: str, prompt: int, answer: int):
        self.model, self.label = model, way
        generator = torch.Generator().manual_seed(0)
        self.prompt_ids = torch.randint(VOCABULARY, (BATCH, prompt), generator=generator)
        self.continuation_ids = torch.randint(VOCABULARY, (BATCH, ANSWERS, answer), generator=generator)
        self.logits = shared_prefix_logits if way == "shared" else repeated_prefix_logits

    def run(self) -> Iterator[None]:
        """Forward and backward, with a yield after each."""
        logits = self.logits(self.model, self.prompt_ids, self.continuation_ids)
        loss = F.cross_entropy(logits.flatten(0, 2), self.continuation_ids.flatten())
        yield
        loss.backward()
        yield

    def time(self) -> list[Lap]:
        self.model.zero_grad(set_to_none=True)
        return laps(self.run())

    def gradients(self) -> dict[str, Tensor]:
        """Of every tensor that is trained."""
        self.time()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def compare(architecture: str, method: str, quick: bool) -> list[dict[str, object]]:
    """The rows of one model.

    Raises:
        RuntimeError: a gradient is another.
    """
    width, layers, prompt, answer = (64, 2, 64, 8) if quick else (256, 4, PROMPT, ANSWER)
    model = build(architecture, method, width, layers)
    cases = [Case(model, way, prompt, answer) for way in WAYS]
    expected, actual = (case.gradients() for case in cases)
    largest = max(error(gradient.double(), actual[name]) for name, gradient in expected.items() if gradient.any())
    if not largest <= LARGEST_ERROR:
        raise RuntimeError(
            f"{architecture}, {method}: a gradient with a shared prompt is {largest:.1e} away from that of a repeated "
            "one.\n  A wrong result has no speed. Run tests/mixers/test_prefix_sharing.py first."
        )
    least = 2 if quick else 3
    times = interleave([Verified(case, {}, 0.0) for case in cases], 0.0, least=least)
    sums = [time.summary("total", "cpu") for time in times]
    sizes = {"width": width, "layers": layers, "batch": BATCH, "prompt": prompt, "answer": answer, "answers": ANSWERS}
    return [
        {"model": architecture, "method": method, "way": way, **sizes}
        | {"runs": least, "median_ms": f"{time.median:.1f}", "p20_ms": f"{time.p20:.1f}", "p80_ms": f"{time.p80:.1f}"}
        | {"speedup": f"{sums[0].median / time.median:.3f}", "gradient_error": f"{largest:.1e}"}
        | {"machine": platform.machine(), "torch": torch.__version__}
        for way, time in zip(WAYS, sums, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the rows as CSV too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `ssmtune train` does
    rows = []
    for architecture, method in CASES:
        rows += compare(architecture, method, args.quick)
        words = f"{architecture:<10}{method:<14}"
        print(f"{words}{rows[-2]['median_ms']:>9} -> {rows[-1]['median_ms']:>8} ms  {rows[-1]['speedup']}x", flush=True)
    if args.out is not None:
        write_table(args.out, rows)


if __name__ == "__main__":
    main()

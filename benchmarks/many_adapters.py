"""Measures many adapters of one base: what a batch of 64 of them costs beside one, and what 1,000 resident ones do.

`python -m benchmarks.many_adapters` reads prompts and decodes with the shipped base, in turns with one adapter for all
rows and with another for each, and appends its rows to benchmarks/results/<device>.csv.
"""

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.stored import command_line, store
from ssmtune.measure import results
from ssmtune.measure.timing import Summary, error, laps

OP = "many_adapters"
WIDTH, DSTATE = 256, 16
"""Of the shipped base."""

METHODS = ("state-offset", "initial-state")
TOLERANCE = 1e-4
"""Rows in a batch may differ by rounding from rows alone: products of matrices are summed in another order."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `resident` adapters are loaded, of which the rows of a batch have different ones."""

    resident: int = 1000
    batch: int = 64
    prompt: int = 64
    new_tokens: int = 32
    rounds: int = 7


QUICK = Sizes(resident=6, batch=3, prompt=5, new_tokens=3, rounds=2)


def store_adapters(method: str, count: int, folder: Path) -> None:
    """Store adapters of random tensors, each in a folder of its own."""
    from ssmtune.methods import apply_method
    from ssmtune.models import load_model

    model = apply_method(load_model("mamba-5m")[0], method)
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"a{index}")


def resident_bytes() -> int:
    """What of this process is in memory, without what only files back and what is free to be used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def load(base: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Load all adapters of a folder.

    Returns:
        The model, and by metric: milliseconds for each adapter, those that peft takes for one more beside them, and the
        memory they take over the bytes of their tensors.
    """
    import ssmtune

    before, start = resident_bytes(), time.process_time()
    model = ssmtune.load_adapters(base, folder)
    spent = time.process_time() - start
    taken, count = resident_bytes() - before, len(model.peft_config)
    own = sum(p.nbytes for name, p in model.named_parameters() if name.rpartition(".")[2] in model.peft_config)
    times = []
    for index in range(3):
        start = time.process_time()
        model.load_adapter(folder / "a0", f"more{index}")
        times.append(time.process_time() - start)
    for index in range(3):
        model.delete_adapter(f"more{index}")
    return model, {"load": 1e3 * spent / count, "peft's load": 1e3 * median(times), "memory / tensors": taken / own}


def cases(model: nn.Module, sizes: Sizes, names: Sequence[str]) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is timed, by what it does and with which adapters."""
    tokens = torch.randint(1, 8000, (sizes.batch, sizes.prompt), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "pad_token_id": 0}
    options |= {"min_new_tokens": sizes.new_tokens, "max_new_tokens": sizes.new_tokens}

    def prefill(**adapters: Any) -> Any:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1, **adapters).logits

    def decode(**adapters: Any) -> Any:
        return model.generate(
            input_ids=tokens[:, :2], attention_mask=torch.ones_like(tokens[:, :2]), **options, **adapters
        )

    found = {}
    for what, call in (("prefill", prefill), ("decode", decode)):
        found[what, "one adapter"] = call
        found[what, f"{len(names)} adapters"] = lambda call=call: call(adapter_names=list(names))
    return found


def check(model: nn.Module, together: torch.Tensor, sizes: Sizes, names: Sequence[str]) -> None:
    """Hold some rows of a batch to the same rows alone, with their adapter active.

    Raises:
        RuntimeError: one differs by more than rounding.
    """
    tokens = torch.randint(1, 8000, (sizes.batch, sizes.prompt), generator=torch.Generator().manual_seed(0))
    for row in range(0, sizes.batch, max(1, sizes.batch // 4)):
        model.set_adapter(names[row])
        alone = model(input_ids=tokens[row : row + 1], logits_to_keep=1).logits[0]
        if not error(alone.double(), together[row]) <= TOLERANCE:
            raise RuntimeError(f"row {row} with {names[row]!r} is not what it is alone; not timed.")
    model.set_adapter(names[0])


def timed(call: Callable[[], Any]) -> float:
    """CPU time in milliseconds."""

    def stage() -> Iterator[None]:
        call()
        yield

    return 1e3 * laps(stage())[0].cpu


def gather(sizes: Sizes) -> float:
    """What gathering the offsets of all rows takes of a scan of as many tokens as a prompt."""
    from ssmtune import ops

    # two rows of each, for rows that all differ are not copied
    stack, index = torch.randn(sizes.batch, 2 * WIDTH, DSTATE), torch.arange(sizes.batch) // 2
    u, delta = (torch.randn(sizes.batch, sizes.prompt, 2 * WIDTH).transpose(1, 2) for _ in range(2))
    B, C = (torch.randn(sizes.batch, sizes.prompt, DSTATE).transpose(1, 2) for _ in range(2))
    A, rows = -torch.rand(2 * WIDTH, DSTATE), ops.gather_rows(stack, index)
    ratios = []
    for _ in range(sizes.rounds + 1):
        scan = timed(lambda: ops.selective_scan(u, delta, A, B, C, delta_softplus=True, state_offset=rows))
        ratios.append(timed(lambda: ops.gather_rows(stack, index)) / scan)
    return median(ratios[1:])


def measure(method: str, sizes: Sizes, keep: Callable[..., None]) -> None:
    """Load adapters of one method, then time batches with one of them and with many."""
    from ssmtune.models import load_model

    base = load_model("mamba-5m")[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store_adapters(method, sizes.resident, Path(folder))
        model, found = load(base, Path(folder))
        for metric, value in found.items():
            keep(f"{method} {sizes.resident} resident", 0, metric, value, "1" if "/" in metric else "ms")
            print(f"{method:14} {metric:18}{value:9.2f}")
        # of all that are resident, as far apart as can be
        names = list(model.peft_config)[:: sizes.resident // sizes.batch][: sizes.batch]
        calls = cases(model, sizes, names)
        check(model, calls["prefill", f"{len(names)} adapters"](), sizes, names)
        samples = {key: [] for key in calls}
        for turn in range(sizes.rounds):
            for key in calls if turn % 2 else reversed(calls):
                samples[key].append(timed(calls[key]))
    for (what, which), sample in samples.items():
        seqlen, steps = (sizes.prompt, 1) if what == "prefill" else (1, sizes.new_tokens)
        pairs = zip(sample, samples[what, "one adapter"], strict=True)
        ratio = Summary.of([many / one for many, one in pairs])
        summary = Summary.of([value / steps for value in sample])
        keep(f"{method} {what} {which}", seqlen, "cpu time", summary, "ms")
        keep(f"{method} {what} {which}", seqlen, "ratio to one adapter", ratio)
        print(
            f"{method:14} {what:8} {which:12}{summary.median:9.1f} ms{ratio.median:7.3f}x "
            f"({ratio.p20:.3f} to {ratio.p80:.3f})",
            flush=True,
        )


def run(quick: bool = False, csv: Path | None = None) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: few adapters and short texts, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.

    Returns:
        0.
    """
    sizes = QUICK if quick else Sizes()
    torch.set_num_threads(1)
    environment, rows = results.environment(), []
    columns = {"op": OP, "pass_": "fwd", "backend": "cpu", "dtype": "float32", "batch": sizes.batch, "threads": 1}
    columns |= {"dim": WIDTH, "dstate": DSTATE}

    def keep(variant: str, seqlen: int, metric: str, value: float | Summary, unit: str = "1") -> None:
        rows.append(environment.row(value, variant=variant, seqlen=seqlen, metric=metric, unit=unit, **columns))

    print(environment)
    for method in METHODS:
        measure(method, sizes, keep)
    share = gather(sizes)
    keep("gather_rows", sizes.prompt, "ratio to scan", share)
    print(f"gather_rows takes {share:.1%} of the scan of {sizes.prompt} tokens")
    store(environment, rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    return run(**vars(command_line("many_adapters", __doc__, quick="few adapters, short texts").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

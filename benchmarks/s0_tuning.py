"""Time a step of S0 tuning of a Falcon-H1 on the CPU, in the package s0-tuning and here, and take its peak memory.

A step is all of a few examples, forward and backward, and Adam's update of the initial states. s0-tuning runs example
after example, with the scan of transformers and, so that the scan is left out of the comparison, with that of ssmtune,
which runs them one by one too, and in one batch.
Losses of three steps are compared first; then they take turns, so that a busy machine is busy for all of them. The
ratios are medians over rounds, in which each ran once. Needs s0-tuning: pip install s0-tuning==0.1.2.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import FalconH1Config, FalconH1ForCausalLM
from transformers.models.falcon_h1.modeling_falcon_h1 import mamba2_chunk_scan
from transformers.utils import logging

import ssmtune
from benchmarks.peak_memory import peak_memory
from benchmarks.peers import s0_mixer
from benchmarks.stored import command_line, store
from ssmtune.measure import results
from ssmtune.measure.timing import Summary, laps

OP = "s0_step"
RATE, L2, CLIP = 1e-3, 5e-4, 1.0
TOLERANCE = 1e-5
"""Largest relative difference of the losses of three steps."""


@dataclass(frozen=True)
class Sizes:
    """Of a model of random weights with the proportions of a small Falcon-H1, and of the examples."""

    width: int = 256
    layers: int = 4
    headdim: int = 32
    dstate: int = 64
    examples: int = 8
    seqlen: int = 128


QUICK = Sizes(width=32, layers=2, headdim=8, dstate=8, examples=2, seqlen=16)


def make(sizes: Sizes) -> tuple[nn.Module, Tensor]:
    """The model and its examples, of which the first half is the prompt."""
    logging.set_verbosity_error()  # transformers warns that its scan is slow
    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=1024,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=2 * sizes.width,
        mamba_n_heads=2 * sizes.width // sizes.headdim,
        mamba_d_head=sizes.headdim,
        mamba_d_state=sizes.dstate,
        mamba_n_groups=1,
    )
    return FalconH1ForCausalLM(config).eval(), torch.randint(1024, (sizes.examples, sizes.seqlen))


def here(sizes: Sizes, batch: int) -> Callable[[int], float]:
    """So many steps of Initial State Tuning in batches of a size, which give the loss of the last."""
    model, tokens = make(sizes)
    model = get_peft_model(model, ssmtune.InitialStateConfig())
    states = [parameter for parameter in model.parameters() if parameter.requires_grad]
    labels = tokens.clone()
    labels[:, : sizes.seqlen // 2] = -100

    def train(steps: int) -> float:
        for state in states:
            state.data.zero_()
        optimizer = torch.optim.Adam(states, lr=RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.0
            for inputs, targets in zip(tokens.split(batch), labels.split(batch), strict=True):
                share = model(input_ids=inputs, labels=targets).loss * len(inputs) / sizes.examples
                share.backward()
                loss += share.item()
            (L2 * sum(state.square().sum() for state in states)).backward()
            torch.nn.utils.clip_grad_norm_(states, CLIP)
            optimizer.step()
        return loss

    return train


def there(sizes: Sizes, scan: Callable[..., Any]) -> Callable[[int], float]:
    """The same in s0-tuning, on the scan given to it in the place of mamba_ssm's."""
    from s0 import S0Config, S0Trainer

    model, tokens = make(sizes)
    config = S0Config(lr=RATE, l2_lambda=L2, grad_clip=CLIP)
    trainer = S0Trainer(s0_mixer.use_s0_mixers(model), lambda index, **_: {"input_ids": tokens[index][None]}, config)
    data = [(index, sizes.seqlen // 2) for index in range(sizes.examples)]

    def train(steps: int) -> float:
        s0_mixer.mamba_chunk_scan_combined = scan
        config.n_steps = steps
        return trainer.train(data)["final_loss"]

    return train


def scan_here(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, **kwargs: Any) -> Any:
    """The scan of ssmtune for what calls that of mamba_ssm."""
    return ssmtune.ssd_scan(x, dt, A, B, C, **kwargs)


CASES: dict[str, Callable[[Sizes], Callable[[int], float]]] = {
    "ssmtune": lambda sizes: here(sizes, sizes.examples),
    "ssmtune, one by one": lambda sizes: here(sizes, 1),
    "s0-tuning, scan of ssmtune": lambda sizes: there(sizes, scan_here),
    "s0-tuning, scan of transformers": lambda sizes: there(sizes, mamba2_chunk_scan),
}


def one_step(name: str, sizes: Sizes) -> Iterator[None]:
    """A step of one of the cases, for its memory; a small one before it, for what is made only once."""
    CASES[name](QUICK)(1)
    train = CASES[name](sizes)
    yield
    train(1)


def timed(train: Callable[[int], float]) -> Iterator[None]:
    """A step, as a stage of its own."""
    train(1)
    yield


def run(quick: bool = False, csv: Path | None = None, rounds: int = 9) -> int:
    """Check, time, print, and append to a file.

    Args:
        quick: a small model, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        rounds: how often each runs.

    Returns:
        0.
    """
    sizes = QUICK if quick else Sizes()
    trains = {name: case(sizes) for name, case in CASES.items()}
    losses = {name: train(3) for name, train in trains.items()}
    for name, loss in losses.items():
        if not abs(loss - losses["ssmtune"]) <= TOLERANCE * losses["ssmtune"]:
            raise RuntimeError(f"{name}: the loss is {loss}, here {losses['ssmtune']}; not timed.")

    samples: dict[str, list[float]] = {name: [] for name in trains}
    for _ in range(2 if quick else rounds):
        for name, train in trains.items():
            samples[name].append(laps(timed(train))[0].cpu)

    memory = {name: peak_memory(one_step, name, sizes) / 2**20 for name in trains}
    environment, rows = results.environment(), []
    columns = {"op": OP, "pass_": "fwdbwd", "dtype": "float32", "batch": sizes.examples, "dim": 2 * sizes.width}
    columns |= {"seqlen": sizes.seqlen, "dstate": sizes.dstate, "threads": torch.get_num_threads()}
    columns["variant"] = f"{sizes.layers} layers"
    for name, sample in samples.items():
        summary = Summary.of([1e3 * seconds for seconds in sample])
        ratio = median(seconds / own for seconds, own in zip(sample, samples["ssmtune"], strict=True))
        share = memory[name] / memory["ssmtune"]
        line = f"{summary.median:9.1f} ms{ratio:7.2f}x{memory[name]:9.1f} MiB{share:7.2f}x"
        print(f"{name:34}{line}", flush=True)
        for metric, unit, value in (
            ("cpu time", "ms", summary),
            ("ratio to ssmtune", "1", ratio),
            ("peak memory", "MiB", memory[name]),
        ):
            rows.append(environment.row(value, backend=name, metric=metric, unit=unit, **columns))
    store(environment, rows, quick, csv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("s0_tuning", __doc__, quick="a small model")
    parser.add_argument("--rounds", type=int, default=9, help="how often each runs")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

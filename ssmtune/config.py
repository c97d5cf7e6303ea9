"""What a training run is configured by: dataclasses, whose fields have a help text and checks.

Neither this nor what reads it imports torch, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of the known names, or nothing."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _option(default: Any, help: str, **checks: Any) -> Any:
    """A dataclass field with its help text and its checks (`minimum`, `above`, `maximum`, `choices`)."""
    metadata = {"help": help, **checks}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MethodConfig:
    name: str = _option("state-offset", "a method by name, such as full, lora or initial-state (docs/methods.md)")
    rank: int | None = _option(None, "rank of LoRA, or of a low-rank state method (default: 8, or dense)", minimum=1)
    alpha: float | None = _option(None, "LoRA scale times rank (default: the rank)", above=0)
    dropout: float | None = _option(None, "of LoRA, or of a low-rank state (default: 0)", minimum=0, maximum=0.9)
    target_modules: list[str] | None = _option(None, "modules that get LoRA (default: see docs/methods.md)")
    layers: list[int] | None = _option(None, "layers to adapt (default: all)", minimum=0)
    conv_state: bool | None = _option(None, "learn what the convolution sees left of the first token too")
    inference_scale: float | None = _option(
        None, "times the trained initial state is taken once training is over (default: 1)", above=0
    )
    reparametrize: int | None = _option(
        None, "train a state or virtual tokens through an MLP with so many hidden units", minimum=1
    )
    virtual_tokens: int | None = _option(None, "of prompt, P-, prefix or suffix tuning (default: 16)", minimum=1)
    extra_states: int | None = _option(None, "states per channel that additional-scan adds (default: 8)", minimum=1)
    channels: float | None = _option(None, "share of the channels that sdt trains (default: 0.01)", above=0, maximum=1)
    states: float | None = _option(None, "share of their states that sdt trains (default: 0.1)", above=0, maximum=1)
    warm_up_steps: int | None = _option(None, "steps after which sdt chooses them (default: 50)", minimum=1)
    last_layers: int | None = _option(None, "how many of the last layers are trained (default: 2)", minimum=1)


@dataclass
class DataConfig:
    path: str | None = _option(None, "training examples: a JSONL or CSV file, or a dataset name on the hub")
    task: str | None = _option(
        None, "a task of `ssmtune compare` by name, in the place of a path: its train and dev examples"
    )
    dir: str | None = _option(None, "the files of a task that reads any, or a dataset on the hub")
    dev_path: str | None = _option(None, "held-out examples; without it a part of the training examples is held out")
    dev_fraction: float = _option(0.05, "share held out when there is no dev_path; 0 for none", minimum=0, maximum=0.5)
    split: str = _option("train", "split of a dataset on the hub")
    template: str = _option("{prompt}", "the prompt, with {column} for the columns of the data; '' for none")
    target: str = _option("completion", "the column to be learnt, or a template with {column} in it")
    max_length: int = _option(512, "longest example in tokens; longer prompts lose their beginning", minimum=2)
    limit: int | None = _option(None, "read at most this many examples", minimum=1)


@dataclass
class TrainConfig:
    steps: int = _option(1000, "optimizer steps", minimum=1)
    batch_size: int = _option(8, "examples per step and device", minimum=1)
    accumulation: int = _option(1, "batches per optimizer step", minimum=1)
    lr: float | None = _option(None, "peak learning rate (default: the method's own)", above=0)
    optimizer: str = _option(
        "adamw", "adamw, or mezo: forward passes alone, in the memory of inference; needs lr", choices=("adamw", "mezo")
    )
    eps: float = _option(1e-3, "of mezo: how far it looks in both directions", above=0)
    warmup: float = _option(0.05, "share of the steps in which the rate rises", minimum=0, maximum=1)
    schedule: str = _option(
        "linear", "how the rate goes on then: it falls linearly to 0, or stays", choices=("linear", "constant")
    )
    weight_decay: float = _option(0.0, "AdamW weight decay", minimum=0)
    l2: float = _option(0.0, "times the sum of squares of what is trained is added to what is minimised", minimum=0)
    clip: float = _option(1.0, "largest gradient norm", above=0)
    seed: int = _option(0, "seed of initialisation, data order and dropout", minimum=0)
    dtype: str = _option(
        "float32",
        "type of the model's weights; adapters and the copies that weights are updated in are float32",
        choices=("float32", "bfloat16"),
    )
    autocast: bool = _option(False, "compute in bfloat16 from float32 weights: faster where the processor can")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass: slower, less memory")
    chunk_length: int | None = _option(
        None, "run so many tokens at once, from the state that those before them left: texts of any length", minimum=2
    )
    chunk_gradients: str = _option(
        "exact",
        "with chunk_length: exact, or truncated at the borders of chunks, which takes a forward pass less",
        choices=("exact", "truncated"),
    )
    log_every: int = _option(10, "steps between lines of metrics.jsonl", minimum=1)
    save_every: int | None = _option(None, "steps between checkpoints (default: eval.every)", minimum=1)
    keep: str = _option(
        "last", "which weights the run ends with: the last, or those of the best dev loss", choices=("last", "best")
    )


@dataclass
class EvalConfig:
    every: int = _option(100, "steps between dev losses", minimum=1)
    batch_size: int = _option(16, "examples per batch of evaluation", minimum=1)
    samples: int = _option(2, "dev prompts continued at each evaluation, for samples.md", minimum=0)
    max_new_tokens: int = _option(48, "longest sample in tokens", minimum=1)


@dataclass
class RunConfig:
    model: str = _option("mamba-5m", "a built-in name, a local directory or a model name on the hub")
    out: str | None = _option(None, "run directory (default: runs/MODEL-METHOD)")
    imports: list[str] = _option([], "modules that register a method of your own (docs/extending.md)")
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

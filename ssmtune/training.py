"""Fine-tuning on transformers.Trainer: one call trains what is trainable in a model and fills a run directory.

Weights are safetensors and the rest is JSON, but for the optimizer, the schedule and the random state of a checkpoint:
those are torch files, which Trainer reads with `weights_only`, so that they hold numbers and cannot run code.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ssmtune import memory
from ssmtune.config import ConfigError, EvalConfig, TrainConfig
from ssmtune.data import Encoded, Example, encode_all
from ssmtune.long_inputs import check_chunkable
from ssmtune.run_directory import RunDirectory, environment, whole_folder, write_json
from ssmtune.trainer import RunTrainer
from ssmtune.training_checkpoint import BEST, assign, read_checkpoint, settings_of
from ssmtune.training_log import RunLog, StopRequest, draw_losses
from ssmtune.tuners.sparse_dimension import choose_dimensions
from ssmtune.weights import parameter_counts, save_weights


@dataclass
class TrainResult:
    """What a run came to.

    `curve` has one dict for each line of metrics.jsonl: step, loss, lr, grad_norm, tokens, tokens_per_second, seconds;
    or step, dev_loss. `train_loss` is the mean of the last log interval; `dev_loss` is that of the weights which the
    model was left with, those of step `kept_step`. `seconds` is the time spent in steps, without evaluations.
    """

    steps: int
    kept_step: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    dev_loss: float | None
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    curve: list[dict[str, Any]] = field(default_factory=list)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run, after a checkpoint was saved."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"interrupted after step {step}")
        self.step, self.checkpoint = step, checkpoint


def train(
    model: nn.Module,
    tokenizer,
    train_examples: Sequence[Example],
    dev_examples: Sequence[Example],
    config: TrainConfig,
    out: Path | None,
    *,
    max_length: int = 512,
    evaluation: EvalConfig | None = None,
    callbacks: Sequence = (),
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train what is trainable in a model, with a learning rate that rises, then falls linearly to zero or stays.

    The order of the examples depends on `config.seed` alone, so every method sees the same batches. Two runs with the
    same arguments give the same weights, and so does one that was interrupted and resumed.

    Args:
        model: what `ssmtune.methods.apply_method` returned; left in evaluation mode with the trained weights.
        train_examples, dev_examples: the second may be empty, for no evaluation.
        config: steps, batch size, learning rate (which must be set) and the rest.
        out: run directory; None writes nothing.
        max_length: longest example in tokens.
        evaluation: how often and how; every `EvalConfig().every` steps by default.
        callbacks: further transformers.TrainerCallback objects.
        resume: go on from the last checkpoint in `out`, if there is one.
        progress: print a line for each log step.

    Raises:
        ConfigError: no learning rate; settings that contradict each other; a checkpoint of other settings or data.
        ValueError: there is a chunk length, and the model cannot be run in chunks.
        RuntimeError: the loss or a gradient became NaN or infinite.
        TrainingInterrupted: Ctrl-C, after a checkpoint was saved in `out`.
    """
    if config.lr is None:
        raise ConfigError(
            "train.lr is not set.\n  Every method has its own default: ssmtune.methods.METHODS[name].default_lr."
        )
    if config.l2 and config.optimizer == "mezo":
        raise ConfigError(
            f"train.l2 is {config.l2} with train.optimizer mezo, which has no gradients to add it to.\n"
            "  Leave train.l2 out, or train with adamw."
        )
    if config.chunk_length is not None:
        _check_chunks(model, config)
    evaluation = evaluation or EvalConfig()
    train_data = encode_all(tokenizer, train_examples, max_length)
    dev_data = encode_all(tokenizer, dev_examples, max_length)
    run = RunDirectory(Path(out)) if out is not None else None
    if run is not None:
        run.path.mkdir(parents=True, exist_ok=True)
    settings = settings_of(config, train_data, model)
    checkpoint = run.last_checkpoint() if run is not None and resume else None
    past = read_checkpoint(checkpoint, settings) if checkpoint is not None else None

    scratch = tempfile.mkdtemp(prefix="ssmtune-")
    memory.reset_peak()
    log = RunLog(run, tokenizer, dev_examples, evaluation, config, past, progress)
    try:
        if past is None:
            warm_up = {"max_length": max_length, "progress": False}
            choose_dimensions(
                model,
                lambda steps: train(
                    model, tokenizer, train_examples, (), replace(config, steps=steps, keep="last"), None, **warm_up
                ),
            )
        trainer = RunTrainer(model, train_data, dev_data, config, evaluation, run, settings, scratch, log)
        if past is not None and past["best_step"] is not None and config.keep == "best":
            trainer.best = load_file(checkpoint / BEST)
        for callback in callbacks:
            trainer.add_callback(callback)
        if past is None and config.optimizer == "adamw":
            _warn_of_dead_tensors(trainer, log)
        for data, name in ((train_data, "training"), (dev_data, "dev")):
            if log.progress.enabled and (cut := data.cut_report(max_length)):
                log.progress.write(f"warning: {name} data: {cut}")
        with StopRequest(enabled=run is not None) as stop:
            log.stop = stop
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        if stop.requested and trainer.state.global_step < config.steps:
            raise TrainingInterrupted(trainer.state.global_step, run.last_checkpoint())
    finally:
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)
    result = _finish(trainer)
    if run is not None and trainer.is_world_process_zero():
        _write_outcome(run, model, tokenizer, result, config)
    return result


def _check_chunks(model: nn.Module, config: TrainConfig) -> None:
    for key, chosen in (("gradient_checkpointing", config.gradient_checkpointing), ("optimizer", config.optimizer)):
        if chosen in (True, "mezo"):
            raise ConfigError(
                f"train.chunk_length is {config.chunk_length}, and train.{key} is {str(chosen).lower()}.\n"
                "  Chunks need a state handed on, and a backward pass through each of them. Leave one of the two out."
            )
    check_chunkable(model)


def _finish(trainer: RunTrainer) -> TrainResult:
    """Put the weights that are kept into the model, and sum the run up."""
    record = trainer.record
    kept_step, dev_loss = trainer.state.global_step, record.last_dev_loss
    if trainer.config.keep == "best" and trainer.best is not None:
        kept_step, dev_loss = record.best_step, record.best_dev_loss
        assign(trainer.model, trainer.best)
    trainer.model.eval()
    trainable, total = parameter_counts(trainer.model)
    losses = [row["loss"] for row in record.rows if "loss" in row]
    return TrainResult(
        steps=trainer.state.global_step,
        kept_step=kept_step,
        seconds=record.seconds,
        tokens_per_second=record.tokens / record.seconds if record.seconds else 0.0,
        train_loss=losses[-1] if losses else math.nan,
        dev_loss=dev_loss,
        peak_memory_bytes=memory.peak_bytes(),
        trainable_parameters=trainable,
        total_parameters=total,
        curve=list(record.rows),
    )


def _warn_of_dead_tensors(trainer: RunTrainer, log: RunLog) -> None:
    from ssmtune.gradcheck import check_gradients

    first = [trainer.train_dataset[index] for index, _ in zip(trainer._get_train_sampler(), range(2), strict=False)]
    if (length := trainer.config.chunk_length) is not None:
        first = [Encoded(item.input_ids[-length:], item.labels[-length:]) for item in first]
    report = check_gradients(trainer.model, trainer.data_collator(first))
    if not report.ok:
        log.progress.write(str(report))


def _write_outcome(run: RunDirectory, model: nn.Module, tokenizer, result: TrainResult, config: TrainConfig) -> None:
    from peft import PeftModel

    adapted = isinstance(model, PeftModel)
    with whole_folder(run.adapter if adapted else run.model) as folder:
        save_weights(model, folder)
        if not adapted:
            tokenizer.save_pretrained(folder)
    draw_losses(result.curve, run.loss_plot)
    # last, since its presence says that the run is complete
    values = dataclasses.asdict(result)
    values.pop("curve")
    write_json(run.summary, {"result": values, "train": dataclasses.asdict(config), "environment": environment()})

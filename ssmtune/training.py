"""Fine-tuning on transformers.Trainer: one call trains what is trainable in a model and fills a run directory.

Weights are safetensors and the rest is JSON, but for the optimizer, the schedule and the random state of a checkpoint:
those are torch files, which Trainer reads with `weights_only`, so that they hold numbers and cannot run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ssmtune import memory
from ssmtune.config import ConfigError, EvalConfig, TrainConfig
from ssmtune.data import Collator, Encoded, EncodedExamples, Example, encode_all
from ssmtune.generation import score_encoded
from ssmtune.likelihood import pad_id, target_losses
from ssmtune.long_inputs import check_chunkable, chunked_backward
from ssmtune.master_weights import MasterAdamW
from ssmtune.mezo import MeZO
from ssmtune.models import no_progress_bars, portable_name
from ssmtune.run_directory import RunDirectory, environment, whole_folder, write_json
from ssmtune.training_log import RunLog, StopRequest, diverged, draw_losses
from ssmtune.tuners.sparse_dimension import choose_dimensions

_PROGRESS = "progress.json"
_BEST = "best.safetensors"
_TRAINABLE = "trainable.safetensors"


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
    settings = _settings(config, train_data, model)
    checkpoint = run.last_checkpoint() if run is not None and resume else None
    past = _read_checkpoint(checkpoint, settings) if checkpoint is not None else None

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
        trainer = _Trainer(model, train_data, dev_data, config, evaluation, run, settings, scratch, log)
        if past is not None and past["best_step"] is not None and config.keep == "best":
            trainer.best = load_file(checkpoint / _BEST)
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
    result = trainer.finish()
    if run is not None and trainer.is_world_process_zero():
        _write_outcome(run, model, tokenizer, result, config)
    return result


class ExampleOrder(Sampler):
    """Indices of the examples of a whole run: one shuffled pass after the other, from a seed of its own.

    A run is one long epoch, so batches are never short and a position in it is a number of batches.
    """

    def __init__(self, examples: int, count: int, seed: int):
        self.examples, self.count, self.seed = examples, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.count
        while left > 0:
            order = torch.randperm(self.examples, generator=generator).tolist()
            yield from order[:left]
            left -= len(order)


class _Trainer(Trainer):
    """transformers.Trainer with an exact dev loss, whole checkpoints, and an end to a run that has diverged."""

    def __init__(self, model, train_data, dev_data, config, evaluation, run, settings, scratch, log):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            learning_rate=config.lr,
            lr_scheduler_type={"linear": "linear", "constant": "constant_with_warmup"}[config.schedule],
            warmup_steps=round(config.steps * config.warmup),
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            seed=config.seed,
            optim="adamw_torch",
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
        )
        # DataParallel would cut up the positions at which logits are wanted; several GPUs are a matter for torchrun
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_data,
            data_collator=Collator(pad_id(log.tokenizer)),
            optimizer_cls_and_kwargs=_optimizer(model, config, arguments),
        )
        # compute_loss divides by the target tokens of the whole step, which Trainer counts if the model asks for them
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(log)
        self.run, self.config, self.evaluation, self.settings, self.record = run, config, evaluation, settings, log
        self.dev_data = dev_data
        self.best: dict[str, torch.Tensor] | None = None
        if config.gradient_checkpointing:
            _recompute_activations(model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _reading(resume_from_checkpoint):
            _assign(self.model, load_file(Path(resume_from_checkpoint, _TRAINABLE)))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        count = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
        return ExampleOrder(len(self.train_dataset), count * self.args.world_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of the target tokens of all batches of a step, over all processes."""
        with self._autocast():
            losses = target_losses(model, inputs, base=self.accelerator.unwrap_model(model))
        loss = losses.sum() / num_items_in_batch * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        tokens = inputs["attention_mask"].sum()
        if self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens.to(self.args.device), "sum")
        self.record.tokens += int(tokens)
        if self.config.optimizer == "mezo":
            loss = self._look_ahead(model, inputs, num_items_in_batch)
        elif self.config.chunk_length is not None:
            loss = self._go_over_chunks(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise diverged("the loss", loss.item(), self.state.global_step + 1, self._get_learning_rate())
        if self.config.l2 and self.accelerator.sync_gradients:
            self._pull_to_zero()
        return loss

    @torch.no_grad()
    def _pull_to_zero(self) -> None:
        """Add the gradient of `l2` times the sum of squares, once a step, and before gradients are clipped."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=2 * self.config.l2)

    def _autocast(self) -> torch.autocast:
        # not through Trainer's own option, which would leave the model wrapped, and evaluated, in bfloat16
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.config.autocast)

    def _go_over_chunks(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """The loss of a batch, after a backward pass through each of its chunks."""
        model.train()
        with self._autocast():
            return chunked_backward(
                model,
                self._prepare_inputs(inputs),
                self.config.chunk_length,
                gradients=self.config.chunk_gradients,
                divisor=num_items_in_batch / self.args.world_size,
                base=self.accelerator.unwrap_model(model),
            )

    def _look_ahead(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """The loss of a batch, by which MeZO, the optimizer inside of accelerate's, will make its step."""
        model.eval()  # dropout would differ in both directions
        inputs = self._prepare_inputs(inputs)
        return self.optimizer.optimizer.estimate(
            lambda: self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch),
            lambda value: self.accelerator.reduce(value, "mean"),
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss of all target tokens of the dev set, each counted once."""
        share = self.dev_data.items[self.args.process_index :: self.args.world_size]
        padding, chunk_length = pad_id(self.record.tokenizer), self.config.chunk_length
        scores = score_encoded(self.model, share, padding, self.evaluation.batch_size, chunk_length)
        sums = torch.tensor(
            [[sum(s.log_likelihood for s in scores), sum(s.tokens for s in scores)]],
            dtype=torch.float32 if self.args.device.type == "mps" else torch.float64,
            device=self.args.device,
        )
        total, tokens = self.accelerator.gather(sums).sum(0).tolist()
        loss = -total / max(tokens, 1)
        if self.config.keep == "best" and self.record.is_best(loss):
            self.best = _trainable(self.model)
        self.log({"dev_loss": loss})
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(_trainable(self.model), Path(output_dir, _TRAINABLE))

    def _get_output_dir(self, trial) -> str:
        return str(self.run.checkpoints / ".new.partial") if self.run is not None else self.args.output_dir

    def _save_checkpoint(self, model, trial) -> None:
        """Let Trainer write a checkpoint into a folder on the side, then give it its name."""
        staging = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = staging / f"checkpoint-{self.state.global_step}"
                if self.best is not None:
                    save_file(self.best, written / _BEST)
                write_json(written / _PROGRESS, self.record.progress_so_far(self.state.global_step) | self.settings)
                final = self.run.checkpoint(self.state.global_step)
                shutil.rmtree(final, ignore_errors=True)
                written.rename(final)
                self.run.drop_checkpoints_before(final)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def finish(self) -> TrainResult:
        """Put the weights that are kept into the model, and sum the run up."""
        record = self.record
        kept_step, dev_loss = self.state.global_step, record.last_dev_loss
        if self.config.keep == "best" and self.best is not None:
            kept_step, dev_loss = record.best_step, record.best_dev_loss
            _assign(self.model, self.best)
        self.model.eval()
        trainable, total = parameter_counts(self.model)
        losses = [row["loss"] for row in record.rows if "loss" in row]
        return TrainResult(
            steps=self.state.global_step,
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


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors and of what an adapter has chosen: all that a run goes on from."""
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad} | _chosen(model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in chosen.items()}


def _chosen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The integers that adapters have beside their tensors."""
    return {
        f"{name}.{key}": index
        for name, module in model.named_modules()
        if isinstance(module, BufferDict)
        for key, index in module.items()
        if not index.is_floating_point()
    }


@torch.no_grad()
def _assign(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    places = dict(model.named_parameters()) | _chosen(model)
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def _optimizer(
    model: nn.Module, config: TrainConfig, arguments: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The class of the optimizer and its options; None for the AdamW of Trainer."""
    if config.optimizer == "mezo":
        return MeZO, {"lr": config.lr, "eps": config.eps, "seed": config.seed}
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        betas = arguments.adam_beta1, arguments.adam_beta2
        return MasterAdamW, {"lr": config.lr, "betas": betas, "eps": arguments.adam_epsilon}
    return None


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write an adapter in peft's format, or a whole model, into a directory.

    A base model from the package is recorded by its name there, so that the adapter can be used on another machine.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        with no_progress_bars():
            model.save_pretrained(directory)
        return
    places = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.base_model_name_or_path = portable_name(config.base_model_name_or_path)
        # "auto" would ask the hub whether the vocabulary has grown
        model.save_pretrained(str(directory), save_embedding_layers=False)
    finally:
        for name, config in model.peft_config.items():
            config.base_model_name_or_path = places[name]


def _settings(config: TrainConfig, data: EncodedExamples, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common."""
    digest = hashlib.sha256()
    for item in data.items:
        digest.update(json.dumps([item.input_ids, item.labels]).encode())
    tensors = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors.update(f"{name}{tuple(parameter.shape)}".encode())
    train = dataclasses.asdict(config)
    for key in ("log_every", "save_every"):
        train.pop(key)
    return {"settings": {**train, "data": digest.hexdigest()[:16], "trainable tensors": tensors.hexdigest()[:16]}}


def _check_chunks(model: nn.Module, config: TrainConfig) -> None:
    for key, chosen in (("gradient_checkpointing", config.gradient_checkpointing), ("optimizer", config.optimizer)):
        if chosen in (True, "mezo"):
            raise ConfigError(
                f"train.chunk_length is {config.chunk_length}, and train.{key} is {str(chosen).lower()}.\n"
                "  Chunks need a state handed on, and a backward pass through each of them. Leave one of the two out."
            )
    check_chunkable(model)


def _recompute_activations(model: nn.Module) -> None:
    # transformers 5.23 renamed it
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read: {reason}\n"
            "  It is damaged, or was not written by ssmtune. Remove it to resume from none, or use --overwrite."
        ) from error


def _read_checkpoint(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        past = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
        stored = past["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}.\n"
            "  Remove it to resume from none, or start again with --overwrite."
        ) from None
    wanted = settings["settings"]
    differing = [key for key in wanted if stored.get(key) != wanted[key]]
    if differing:
        listed = ", ".join(
            f"{key} ({stored.get(key)} then, {wanted[key]} now)" if key in TrainConfig.__dataclass_fields__ else key
            for key in differing
        )
        raise ConfigError(
            f"checkpoint {checkpoint} belongs to a run with other settings: {listed}.\n"
            "  Resume with the same settings, or start again with --overwrite or another --out."
        )
    return past


def _warn_of_dead_tensors(trainer: _Trainer, log: RunLog) -> None:
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

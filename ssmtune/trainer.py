"""transformers.Trainer as ssmtune drives it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ssmtune.config import TrainConfig
from ssmtune.data import Collator
from ssmtune.generation import score_encoded
from ssmtune.likelihood import pad_id, target_losses
from ssmtune.long_inputs import chunked_backward
from ssmtune.master_weights import MasterAdamW
from ssmtune.mezo import MeZO
from ssmtune.run_directory import write_json
from ssmtune.training_checkpoint import BEST, PROGRESS, TRAINABLE, assign, reading, trained_tensors
from ssmtune.training_log import diverged


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


class RunTrainer(Trainer):
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
        with reading(resume_from_checkpoint):
            assign(self.model, load_file(Path(resume_from_checkpoint, TRAINABLE)))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with reading(checkpoint):
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
            self.best = trained_tensors(self.model)
        self.log({"dev_loss": loss})
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(self.model), Path(output_dir, TRAINABLE))

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
                    save_file(self.best, written / BEST)
                write_json(written / PROGRESS, self.record.progress_so_far(self.state.global_step) | self.settings)
                final = self.run.checkpoint(self.state.global_step)
                shutil.rmtree(final, ignore_errors=True)
                written.rename(final)
                self.run.drop_checkpoints_before(final)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)


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


def _recompute_activations(model: nn.Module) -> None:
    # transformers 5.23 renamed it
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

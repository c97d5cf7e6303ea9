"""How the runs of a comparison are made: train one method once on one task, and measure what came of it."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from ssmtune.best_weights import incoming
from ssmtune.cells import Cell
from ssmtune.config import EvalConfig, TrainConfig
from ssmtune.data import Collator, encode_all
from ssmtune.effects import measure_effects
from ssmtune.effects.context import Context
from ssmtune.effects.decoding import decoding_milliseconds
from ssmtune.generation import pad_id, target_log_likelihood
from ssmtune.methods import apply_method, get_method
from ssmtune.peft_results import peft_config
from ssmtune.prechecks import run_prechecks
from ssmtune.step_log import StepLog
from ssmtune.training import train
from ssmtune.weights import parameter_counts, save_weights

if TYPE_CHECKING:
    from ssmtune.comparison import ComparisonConfig

PRECHECK_EXAMPLES = 4
EVALUATION_BATCH = 32


class TaskRuns:
    """Runs on one task. Each starts from a copy of the base model, which stays as it is.

    `callback` gives the callback of Trainer that shows the steps of a cell.
    """

    def __init__(
        self, context: Context, config: ComparisonConfig, out: Path, callback: Callable[[Cell], TrainerCallback]
    ):
        self.context, self.task, self.base, self.tokenizer = context, context.task, context.base, context.tokenizer
        self.config, self.out, self.callback = config, out, callback
        task, tokenizer = self.task, self.tokenizer
        self.checks: dict[str, list[dict[str, Any]]] = {}
        sample = encode_all(tokenizer, task.train[:PRECHECK_EXAMPLES], task.max_length)
        self.batch = Collator(pad_id(tokenizer))(sample.items)
        self.prompts = [example.prompt for example in task.dev[:2]]
        # What decides a result besides its cell and the weights of the base.
        self.conditions = {
            "task": task.fingerprint(),
            "max_length": task.max_length,
            "batch_size": config.batch_size,
            "warmup": config.warmup,
            "autocast": config.autocast,
            "evaluations": config.evaluations,
            "measures": sorted(config.measures),
            "texts": context.fingerprint(),
        }

    def cost(self, cell: Cell) -> float:
        """Work in forward passes of one token, for the estimate of the time that is left; a step costs three."""
        task = self.task
        evaluations = self.config.evaluations if cell.stage == "final" else 1
        scored = 0 if cell.stage == "search" else len(task.test)
        passes = 3 if task.choices else 1 + 8 * task.max_new_tokens / self._tokens_per_example
        trained = 3 * cell.steps * self.config.batch_size
        return self._tokens_per_example * (trained + len(task.dev) * evaluations + scored * passes)

    @cached_property
    def _tokens_per_example(self) -> float:
        sample = encode_all(self.tokenizer, self.task.train[:200], self.task.max_length)
        return sample.tokens / len(sample)

    def measure_base(self) -> dict[str, Any]:
        """The record of the model as it is."""
        dev = self.task.dev
        scores = target_log_likelihood(
            self.base,
            self.tokenizer,
            [example.prompt for example in dev],
            [example.target for example in dev],
            EVALUATION_BATCH,
            max_length=self.task.max_length,
            add_eos=True,
        )
        train_info = {
            "num_trainable_params": 0,
            "num_total_params": parameter_counts(self.base)[1],
            "dev_loss": -sum(score.log_likelihood for score in scores) / max(1, sum(score.tokens for score in scores)),
            "decode_ms_per_token": decoding_milliseconds(self.base, self.tokenizer, self.prompts[0]),
        }
        return {"train_info": train_info, **self._tested(self.base), "effects": self._effects(self.base)}

    def train(self, cell: Cell) -> dict[str, Any]:
        """The record of one training run; a final one is measured on test, and its weights kept if they are best."""
        config, task = self.config, self.task
        model = apply_method(copy.deepcopy(self.base), cell.method, seed=cell.seed)
        checks = self._checked(cell.method, model)
        settings = TrainConfig(
            steps=cell.steps,
            batch_size=config.batch_size,
            lr=cell.lr,
            warmup=config.warmup,
            seed=cell.seed,
            autocast=config.autocast,
            log_every=max(1, cell.steps // 20),
        )
        evaluations = config.evaluations if cell.stage == "final" else 1
        steps = StepLog()
        _return_freed_memory()
        result = train(
            model,
            self.tokenizer,
            task.train,
            task.dev,
            settings,
            None,
            max_length=task.max_length,
            evaluation=EvalConfig(every=math.ceil(cell.steps / evaluations), batch_size=EVALUATION_BATCH, samples=0),
            callbacks=[self.callback(cell), steps],
            progress=False,
        )
        train_info = {
            "steps": result.steps,
            "train_time": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "train_loss": result.train_loss,
            "dev_loss": result.dev_loss,
            "metrics": result.curve,
            "total_tokens": next(row["tokens"] for row in reversed(result.curve) if "tokens" in row),
            "peak_memory_bytes": result.peak_memory_bytes,
            **steps.summary(result.peak_memory_bytes),
            "num_trainable_params": result.trainable_parameters,
            "num_total_params": result.total_parameters,
        }
        record = {
            "train_config": asdict(settings),
            "peft_config": peft_config(model),
            "checks": checks,
            "train_info": train_info,
        }
        if cell.stage == "final":
            record |= self._tested(model)
            train_info["decode_ms_per_token"] = decoding_milliseconds(model, self.tokenizer, self.prompts[0])
            train_info["file_size"] = self._save(model, cell)
            record["effects"] = self._effects(model)
        return record

    def _tested(self, model: nn.Module) -> dict[str, Any]:
        """The metrics on test, and what each example adds to the headline one."""
        answers = self.task.answers(model, self.tokenizer, self.task.test, EVALUATION_BATCH)
        terms = self.task.terms(answers, self.task.test)
        return {
            "metrics": {"test": self.task.score(answers, self.task.test)},
            "terms": None if terms is None else terms.packed(),
        }

    def _effects(self, model: nn.Module) -> dict[str, Any]:
        return measure_effects(model, self.context, self.config.measures)

    def _checked(self, method: str, model: nn.Module) -> list[dict[str, Any]]:
        """The pre-checks of a method, made once.

        Raises:
            RuntimeError: one fails, so that the method may not be trained.
        """
        if method not in self.checks:
            checks = run_prechecks(model, self.base, self.tokenizer, get_method(method), self.batch, self.prompts)
            self.checks[method] = [asdict(check) for check in checks]
        if red := [f"{check['name']}: {check['detail']}" for check in self.checks[method] if check["passed"] is False]:
            raise RuntimeError(
                f"{method} was not trained on {type(self.base).__name__}, since it fails its check of {'; '.join(red)}"
            )
        return self.checks[method]

    def _save(self, model: nn.Module, cell: Cell) -> int:
        """Leave the weights where the sweep finds them, and return their size in bytes."""
        folder = incoming(self.out, cell)
        save_weights(model, folder)
        if get_method(cell.method).kind == "full":
            self.tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _return_freed_memory() -> None:
    """Give freed memory back to the system, so that the peak of a run is not that of the one before it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library than glibc: the peak is an upper bound

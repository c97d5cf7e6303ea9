"""What a run leaves to be read: metrics.jsonl, samples.md, loss.png and the lines on the screen."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ssmtune.config import EvalConfig, TrainConfig
from ssmtune.data import Example
from ssmtune.generation import generate_texts
from ssmtune.progress import ProgressLine
from ssmtune.run_directory import RunDirectory, write_whole


class StopRequest:
    """Turns the first Ctrl-C into a request to stop after the current step; the second interrupts at once."""

    def __init__(self, enabled: bool = True):
        self.requested = False
        # Python delivers signals to the main thread alone
        self.enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopRequest:
        if self.enabled:
            self.previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, self.previous)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def diverged(what: str, value: float, step: int, lr: float) -> RuntimeError:
    """The error for a run whose numbers are not finite any more."""
    return RuntimeError(
        f"{what} became {value} at step {step} (learning rate {lr:.2e}).\n"
        "  The step was too large, or the data has a broken example.\n"
        f"  Try a smaller rate, such as --train.lr {lr / 4:.1e}, or a longer --train.warmup."
    )


class RunLog(TrainerCallback):
    """Decides when to log, evaluate and save, counts tokens and time, and writes what happens down."""

    def __init__(
        self,
        run: RunDirectory | None,
        tokenizer,
        dev_examples: Sequence[Example],
        evaluation: EvalConfig,
        config: TrainConfig,
        past: dict[str, Any] | None,
        progress: bool,
    ):
        self.run, self.tokenizer, self.evaluation, self.config = run, tokenizer, evaluation, config
        self.dev = bool(dev_examples)
        self.sampled = list(dev_examples[: evaluation.samples])
        self.stop: StopRequest | None = None
        past = past or {}
        self.rows: list[dict[str, Any]] = past.get("rows", [])
        self.tokens: int = past.get("tokens", 0)
        self.seconds: float = past.get("seconds", 0.0)
        self.best_dev_loss: float | None = past.get("best_dev_loss")
        self.best_step: int | None = past.get("best_step")
        self.last_dev_loss: float | None = past.get("last_dev_loss")
        self.resumed_at: int = past.get("step", 0)
        self._tokens_logged, self._seconds_logged = self.tokens, self.seconds
        self.progress = ProgressLine(config.steps, self.resumed_at, progress)

    def is_best(self, dev_loss: float) -> bool:
        """Whether this dev loss is lower than all before; asked once for each evaluation."""
        return self.best_dev_loss is None or dev_loss < self.best_dev_loss

    def progress_so_far(self, step: int) -> dict[str, Any]:
        """What a resumed run needs to know of the time before."""
        return {
            "step": step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best_dev_loss": self.best_dev_loss,
            "best_step": self.best_step,
            "last_dev_loss": self.last_dev_loss,
            "rows": self.rows,
        }

    def on_train_begin(self, args, state, control, **_: Any):
        if self.run is None or not state.is_world_process_zero:
            return
        self.run.clear_partial()
        self.run.summary.unlink(missing_ok=True)
        write_whole(self.run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        samples = self.run.samples.read_text(encoding="utf-8") if self.run.samples.is_file() else ""
        write_whole(self.run.samples, _samples_until(samples, self.resumed_at if self.rows else -1))

    def on_step_begin(self, args, state, control, **_: Any):
        self._step_began = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_: Any):
        # a NaN or an infinite norm makes every clipped gradient NaN
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise diverged("a gradient", float("nan"), state.global_step + 1, optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **_: Any):
        self.seconds += time.monotonic() - self._step_began
        step, last = state.global_step, state.global_step >= self.config.steps
        self.progress.step(step)
        stopping = self.stop is not None and self.stop.requested
        control.should_log = step % self.config.log_every == 0 or last
        control.should_evaluate = self.dev and (step % self.evaluation.every == 0 or last)
        every = self.config.save_every or self.evaluation.every
        control.should_save = self.run is not None and (step % every == 0 or last or stopping)
        if stopping:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **_: Any):
        if not state.is_world_process_zero or not logs:
            return
        if "dev_loss" in logs:
            row = {"step": state.global_step, "dev_loss": logs["dev_loss"]}
        elif "loss" in logs:
            tokens, seconds = self.tokens - self._tokens_logged, self.seconds - self._seconds_logged
            self._tokens_logged, self._seconds_logged = self.tokens, self.seconds
            row = {
                "step": state.global_step,
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": self.tokens,
                "tokens_per_second": tokens / seconds if seconds else 0.0,
                "seconds": self.seconds,
            }
        else:
            return
        self.rows.append(row)
        if self.run is not None:
            with self.run.metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        self.progress.log(row)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **_: Any):
        loss = metrics["eval_loss"]
        self.last_dev_loss = loss
        if self.is_best(loss):
            self.best_dev_loss, self.best_step = loss, state.global_step
        if self.run is None or not self.sampled or not state.is_world_process_zero:
            return
        prompts = [example.prompt for example in self.sampled]
        texts = generate_texts(model, self.tokenizer, prompts, self.evaluation.max_new_tokens)
        section = [f"## step {state.global_step}, dev loss {loss:.4f}\n"]
        for prompt, text in zip(prompts, texts, strict=True):
            section.append(_quoted(f"{prompt}⟶{text}"))
        with self.run.samples.open("a", encoding="utf-8") as lines:
            lines.write("\n".join(section) + "\n")
        self.progress.write(f"  sample: {_one_line(prompts[0], 40, tail=True)}⟶{_one_line(texts[0], 70)}")

    def close(self) -> None:
        self.progress.close()


def draw_losses(curve: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw training and dev loss over the steps; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("dev_loss", "dev")):
        points = [(row["step"], row[key]) for row in curve if row.get(key) is not None]
        if points:
            marker = "o" if len(points) < 3 or key == "dev_loss" else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel="step", ylabel="loss per target token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    return True


def _samples_until(text: str, step: int) -> str:
    """The sections of a samples.md up to a step."""
    sections = re.split(r"(?m)^(?=## step \d+)", text)
    kept = [part for part in sections[1:] if int(re.match(r"## step (\d+)", part).group(1)) <= step]
    return "# Samples\n\nDev prompts, and after the arrow what the model made of them.\n\n" + "".join(kept)


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) + "\n"


def _one_line(text: str, width: int, tail: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return f"…{text[-width:]}" if tail else f"{text[:width]}…"

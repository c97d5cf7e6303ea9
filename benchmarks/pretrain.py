"""Pre-trains the small base models that ship with ssmtune, all on the same tokens in the same order.

    python -m benchmarks.pretrain mamba --data wiki_en_slice.jsonl.xz --out runs/pretrain --tokens 20e6
    python -m benchmarks.pretrain mamba --out runs/pretrain --tokens 60e6      # goes on where it stopped, to a new end
    python -m benchmarks.pretrain llama --out runs/pretrain --tokens 20e6      # another one on the data prepared there
    python -m benchmarks.pretrain mamba --out runs/pretrain --export ssmtune/checkpoints/mamba-5m

The learning rate warms up, stays, and falls linearly to zero over the last fifth of the tokens, so that a run can be
given a new end as long as it has not begun to fall. Ctrl-C writes a checkpoint; a killed run goes on from the last one.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ssmtune
from benchmarks.base_models import ARCHITECTURES, SEED, VOCAB_SIZE, build_model, describe
from ssmtune.mixers import find_mixers

END_OF_TEXT = "<|endoftext|>"
SEQLEN = 512
BATCH = 16
MICRO_BATCH = 2  # small enough for the activations of a layer to stay in the cache
HELD_OUT_ARTICLES = 400
PEAK_LR = 3e-3
WARMUP_STEPS = 150
DECAY_FRACTION = 0.2


def read_articles(path: Path) -> Iterator[str]:
    """Articles of a JSON-lines file, plain or xz, as `title`, newline, `text`."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            article = json.loads(line)
            yield f"{article['title']}\n{article['text']}"


def prepare(data: Path, out: Path) -> None:
    """Trains the tokenizer and writes train.npy and held_out.npy (uint16 tokens) and corpus.json."""
    if (out / "corpus.json").exists():
        return
    articles = list(tqdm(read_articles(data), desc="reading", unit=" articles"))
    order = np.random.default_rng(SEED).permutation(len(articles))
    held_out, train = order[:HELD_OUT_ARTICLES], order[HELD_OUT_ARTICLES:]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((articles[i] for i in train), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    ).save_pretrained(out / "tokenizer")

    end = tokenizer.token_to_id(END_OF_TEXT)
    for name, indices in (("held_out", held_out), ("train", train)):
        tokens: list[np.ndarray] = []
        for start in tqdm(range(0, len(indices), 512), desc=f"tokenizing {name}"):
            batch = tokenizer.encode_batch([articles[i] for i in indices[start : start + 512]])
            tokens += [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in batch]
        np.save(out / f"{name}.npy", np.concatenate(tokens))
    n_bytes = sum(len(articles[i].encode()) for i in held_out)
    (out / "corpus.json").write_text(
        json.dumps({"articles": len(articles), "held_out_articles": len(held_out), "held_out_bytes": n_bytes})
    )


def build_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Weight decay on matrices only; never on A_log, D, norms or biases."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("A_log")]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int) -> float:
    decay_steps = max(1, int(steps * DECAY_FRACTION))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay_steps)


@functools.lru_cache(maxsize=2)
def shuffled(windows: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((SEED, epoch)).permutation(windows)


def batch_of(tokens: np.ndarray, step: int) -> torch.Tensor:
    """Batch number `step`: the windows of a shuffled epoch, reshuffled for every epoch, by SEED alone."""
    windows = (len(tokens) - 1) // SEQLEN
    rows = []
    for i in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(i, windows)
        window = shuffled(windows, epoch)[place]
        rows.append(tokens[window * SEQLEN : window * SEQLEN + SEQLEN + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def next_token_loss(model: PreTrainedModel, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


def backward(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Accumulates the gradient of the batch's mean loss and returns that loss."""
    mean = 0.0
    for rows in batch.split(MICRO_BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, rows) * (len(rows) / len(batch))
        loss.backward()
        mean += loss.item()
    return mean


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: np.ndarray, windows: int | None = None) -> tuple[float, int]:
    """Summed cross entropy (nats) over windows of SEQLEN tokens, and how many tokens that is."""
    model.eval()
    n = (len(tokens) - 1) // SEQLEN
    n = n if windows is None else min(n, windows)
    total = 0.0
    for start in range(0, n, BATCH):
        rows = [tokens[w * SEQLEN : w * SEQLEN + SEQLEN + 1] for w in range(start, min(start + BATCH, n))]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        total += next_token_loss(model, batch, reduction="sum").item()
    model.train()
    return total, n * SEQLEN


def save_checkpoint(out: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """One file each for weights and optimizer; state.json is written last and names the step they belong to."""
    (out / "state.json").unlink(missing_ok=True)
    save_file({n: p.detach() for n, p in model.named_parameters()}, out / "model.safetensors")
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    (out / "state.json").write_text(json.dumps({"step": step, "tokens": step * BATCH * SEQLEN}))


def rotate_checkpoint(out: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes beside the last checkpoint, then takes its place, so that a kill never leaves a broken one."""
    new, last, old = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    new.mkdir(exist_ok=True)
    save_checkpoint(new, model, optimizer, step)
    if last.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(last, old)
    os.rename(new, last)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(out: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW | None = None) -> int:
    for name in ("checkpoint", "checkpoint.old"):
        directory = out / name
        if (directory / "state.json").exists():
            model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
            model.tie_weights()
            if optimizer is not None:
                optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
            return json.loads((directory / "state.json").read_text())["step"]
    return 0


def train(architecture: str, data: Path, tokens_wanted: float, checkpoint_minutes: float) -> None:
    train_tokens = np.load(data / "train.npy", mmap_mode="r")
    held_out = np.load(data / "held_out.npy")
    out = data / architecture
    out.mkdir(exist_ok=True)
    model = build_model(architecture).train()
    optimizer = build_optimizer(model)
    first = load_checkpoint(out, model, optimizer)
    if find_mixers(model):
        print(ssmtune.patch(model))
    print(f"{architecture}: {model.num_parameters():,} parameters · {len(train_tokens):,} training tokens")

    steps = math.ceil(tokens_wanted / (BATCH * SEQLEN))
    saved = started = time.monotonic()
    step = first
    progress = tqdm(total=steps, initial=first, unit="step", disable=not sys.stderr.isatty())
    with (out / "metrics.jsonl").open("a") as metrics:
        try:
            for step in range(first, steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps)
                loss = backward(model, batch_of(train_tokens, step))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                progress.update()
                if step % 20 == 0 or step == steps - 1:
                    row = {"step": step, "tokens": (step + 1) * BATCH * SEQLEN, "loss": loss}
                    row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
                    if step % 200 == 0 or step == steps - 1:
                        total, count = held_out_loss(model, held_out, windows=64)
                        row["held_out_loss"] = total / count
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    progress.set_postfix(loss=f"{row['loss']:.3f}")
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    rotate_checkpoint(out, model, optimizer, step + 1)
                    saved = time.monotonic()
            step = steps
        except KeyboardInterrupt:
            print(f"\nstopped at step {step}; the same command goes on from here")
    rotate_checkpoint(out, model, optimizer, step)


CARD = """\
---
library_name: transformers
license: cc-by-sa-3.0
language: en
---

# {name}

A language model of architecture `{architecture}`, {parameters:,} parameters ({shape}; byte-level BPE of {vocab:,}
tokens), small enough to fine-tune on a laptop. It ships with ssmtune to show, test and compare the methods; it is not
meant for use.

| | |
|---|---|
| data | {articles:,} English Wikipedia articles, {train_tokens:,} tokens (CC BY-SA 3.0) |
| tokens seen | {tokens:,} ({epochs:.1f} epochs), sequences of {seqlen} |
| held out | {held_out_articles} articles, {held_out_tokens:,} tokens |
| held-out perplexity | {perplexity:.2f} per token, {bits_per_byte:.3f} bits per byte (float16 weights) |
| optimizer | AdamW, {lr} constant, then linear to 0 over the last fifth; batch {batch} x {seqlen}; bfloat16 autocast |
| made by | `python -m benchmarks.pretrain {architecture}`; curve in `benchmarks/results/pretrain-{name}.jsonl` |
"""


def export(architecture: str, data: Path, destination: Path) -> None:
    """Writes the last checkpoint as a float16 model with its tokenizer and card, measured as written."""
    model = build_model(architecture)
    step = load_checkpoint(data / architecture, model)
    if getattr(model.config, "rescale_prenorm_residual", False):
        model.config.rescale_prenorm_residual = False  # transformers would scale the trained weights when it loads them
    model.half().save_pretrained(destination)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    tokenizer.save_pretrained(destination)

    model = AutoModelForCausalLM.from_pretrained(destination, dtype=torch.float32)
    if find_mixers(model):
        ssmtune.patch(model)
    held_out, corpus = np.load(data / "held_out.npy"), json.loads((data / "corpus.json").read_text())
    total, count = held_out_loss(model, held_out)
    train_tokens = len(np.load(data / "train.npy", mmap_mode="r"))
    card = CARD.format(
        name=destination.name,
        architecture=architecture,
        shape=describe(model.config),
        parameters=model.num_parameters(),
        vocab=VOCAB_SIZE,
        articles=corpus["articles"],
        train_tokens=train_tokens,
        tokens=step * BATCH * SEQLEN,
        epochs=step * BATCH * SEQLEN / train_tokens,
        seqlen=SEQLEN,
        held_out_articles=corpus["held_out_articles"],
        held_out_tokens=count,
        perplexity=math.exp(total / count),
        bits_per_byte=total / math.log(2) / (corpus["held_out_bytes"] * count / len(held_out)),
        lr=PEAK_LR,
        batch=BATCH,
    )
    (destination / "README.md").write_text(card)
    print(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=list(ARCHITECTURES))
    parser.add_argument("--data", type=Path, help="JSON lines with title and text, plain or xz; needed once")
    parser.add_argument(
        "--out", type=Path, required=True, help="working directory: the prepared data, and a folder for each model"
    )
    parser.add_argument("--tokens", type=float, default=40e6, help="tokens to have seen at the end")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the shipped model from the last checkpoint")
    args = parser.parse_args()
    if args.export:
        export(args.architecture, args.out, args.export)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:
        prepare(args.data, args.out)
    elif not (args.out / "corpus.json").exists():
        parser.error(f"{args.out} holds no prepared data: pass --data once")
    train(args.architecture, args.out, args.tokens, args.checkpoint_minutes)


if __name__ == "__main__":
    main()

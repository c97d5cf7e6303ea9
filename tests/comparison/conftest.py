import json
from functools import partial
from pathlib import Path

import pytest
import torch

from ssmtune import cell_runs
from ssmtune.cells import FORMAT, Cell, CellStore
from ssmtune.comparison import ComparisonConfig, run_comparison
from ssmtune.effects.decoding import decoding_milliseconds

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 0}


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch) -> None:
    """Decode two tokens, not 32, where a run is asked how long one takes."""
    monkeypatch.setattr(cell_runs, "decoding_milliseconds", partial(decoding_milliseconds, tokens=2))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A tiny random Mamba with one token per byte, saved."""
    from transformers import MambaConfig, MambaForCausalLM

    return _saved(tmp_path_factory.mktemp("checkpoint"), MambaForCausalLM, MambaConfig(**SIZES, state_size=8))


@pytest.fixture(scope="session")
def tiny_transformer(tmp_path_factory) -> Path:
    """A tiny random Llama with the same tokens, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return _saved(tmp_path_factory.mktemp("checkpoint"), LlamaForCausalLM, config)


def _saved(folder: Path, kind: type, config) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = folder / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_data(folder: Path) -> Path:
    """Train, dev and test files of a few short examples."""
    folder.mkdir()
    for split, size in (("train", 12), ("dev", 4), ("test", 4)):
        rows = [{"prompt": f"{split} {'x' * (i % 3)}{i}", "completion": f"is {i * i}"} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def small_comparison(model: Path, data_dir: Path) -> ComparisonConfig:
    return ComparisonConfig(
        model=str(model),
        tasks=["files"],
        data_dir=str(data_dir),
        methods=["lora", "state-offset"],
        seeds=2,
        steps=3,
        search_steps=2,
        search_seeds=1,
        lr_factors=[1.0, 3.0],
        batch_size=3,
        evaluations=2,
        measures=[],
    )


@pytest.fixture
def small(tiny_checkpoint, data_dir) -> ComparisonConfig:
    """A comparison of seconds."""
    return small_comparison(tiny_checkpoint, data_dir)


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory) -> tuple[ComparisonConfig, Path]:
    """A comparison of seconds, and where one process ran it from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = small_comparison(tiny_checkpoint, write_data(folder / "data"))
    config.methods, config.measures = ["state-offset"], ["forgetting", "length"]
    run_comparison(config, folder / "out")
    return config, folder / "out"


@pytest.fixture
def fake(tmp_path):
    """Writes the directory of a comparison without training: fake({"lora": [60, 62], ...}, ...) -> its path."""

    def write(scores, base=20.0, metric="accuracy", higher=True, failed=(), checks=(), name="made-up"):
        out = tmp_path / "comparison"
        sizes = {
            "full": 5_000_000,
            "lora": 80_000,
            "prompt-tuning": 4_096,
            "initial-state": 49_152,
            "state-offset": 49_152,
            "state-offset-y": 3_072,
        }
        rates = [0.1, 0.3, 0.9]
        names = list(scores) + [method for method in failed if method not in scores]
        description = {
            "format": FORMAT,
            "model_fingerprint": "m",
            "config": {
                "model": "mamba-5m",
                "tasks": [name],
                "methods": names,
                "seeds": 3,
                "steps": 100,
                "search_steps": 30,
                "search_seeds": 1,
                "lr_factors": [0.333, 1, 3],
                "batch_size": 16,
                "warmup": 0.1,
                "autocast": False,
            },
            "tasks": {
                name: {
                    "metric": metric,
                    "higher_is_better": higher,
                    "description": "a made-up task",
                    "choices": 8,
                    "sizes": {"train": 800, "dev": 64, "test": 256},
                    "steps": 100,
                    "search_steps": 30,
                    "fingerprint": "t",
                    "example": "Once",
                }
            },
            "methods": {
                m: {"title": m.upper(), "kind": "prompt" if m == "prompt-tuning" else "state", "learning_rates": rates}
                for m in names
            },
            "environment": {
                "device": "a machine",
                "threads": 2,
                "python": "3.11",
                "packages": {"torch": "2"},
                "revision": "abc",
                "command": "ssmtune compare",
            },
        }
        out.mkdir()
        (out / "comparison.json").write_text(json.dumps(description))
        store = CellStore(out / "cells")
        info = {"created_at": "2026-11-20T10:00:00+00:00", "total_time": 2.0, "task": "t", "model": "m"}
        common = {"hash": "h", "status": "success", "error": None, "checks": [], "run_info": info}
        store.write(
            Cell(name, "base", "base"),
            common
            | {
                "train_info": {
                    "num_trainable_params": 0,
                    "num_total_params": 5_000_000,
                    "dev_loss": 3.0,
                    "decode_ms_per_token": 4.0,
                },
                "metrics": {"test": {metric: base}, "dev": {metric: base}},
            },
        )
        for method, values in scores.items():
            for lr in rates:
                store.write(
                    Cell(name, method, "search", lr, 1000, 30),
                    common | {"train_info": {"dev_loss": 2.0 + abs(lr - 0.3)}},
                )
            for seed, value in enumerate(values):
                curve = [
                    {"step": 50, "dev_loss": 2.5 + seed / 10},
                    {"step": 60, "loss": 1.0},
                    {"step": 100, "dev_loss": 2.0 + seed / 10},
                ]
                store.write(
                    Cell(name, method, "final", 0.3, seed, 100),
                    common
                    | {
                        "checks": list(checks),
                        "train_info": {
                            "num_trainable_params": sizes[method],
                            "num_total_params": 5_100_000,
                            "dev_loss": 2.0,
                            "train_time": 20.0,
                            "tokens_per_second": 4000.0,
                            "peak_memory_bytes": 2**30,
                            "file_size": 4 * sizes[method],
                            "decode_ms_per_token": 5.0,
                            "step_ms": 40.0,
                            "metrics": curve,
                        },
                        "metrics": {"test": {metric: value, "loss": 1.5}, "dev": {metric: value}},
                    },
                )
        for method in failed:
            store.write(
                Cell(name, method, "final", None, 0, 100),
                common | {"status": "failed", "error": f"{method} <broke>\nat once", "traceback": "..."},
            )
        return out

    return write

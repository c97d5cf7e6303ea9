"""The commands on transformers, where no mixer is patched, and on Mamba-2."""

import json

import pytest
import torch
import transformers

from ssmtune.cells import CellStore
from ssmtune.cli.main import main

ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4}
# by what transformers puts in front of `Config` and `ForCausalLM`: sizes, and the method that is trained
KINDS = {
    "GPTNeoX": (ATTENTION, "prefix-tuning"),
    "Llama": (ATTENTION | {"num_key_value_heads": 2}, "prefix-tuning-mlp"),
    "Mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 4}, "prompt-tuning"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, tiny_checkpoint, tmp_path_factory) -> str:
    """Directory of a random model of this kind with the tokenizer of `tiny_checkpoint`."""
    path = tmp_path_factory.mktemp(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(path)
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    tokens = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    config = getattr(transformers, f"{kind}Config")(**sizes, **tokens, **KINDS[kind][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"the sea {i}", "completion": "is blue"} for i in range(8)]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_train_and_generate(kind, checkpoint, data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "--method",
        KINDS[kind][1],
        "--data",
        str(data / "train.jsonl"),
        "--train.steps",
        "3",
        "--out",
        str(out),
    ]
    assert main(["train", checkpoint, *arguments, "--quiet"]) == 0
    backend = "2 mixers" if kind == "Mamba2" else "transformers (no mixer that ssmtune knows)"
    assert backend in capsys.readouterr().out
    prompts = ["--prompt", "the sea", "--prompt", "the sun is not blue"]
    assert main(["generate", str(out), *prompts, "--max-new-tokens", "4"]) == 0
    assert "the sun is not blue" in capsys.readouterr().out


def test_compare_runs_the_methods_that_fit(kind, checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("ssmtune.cli.report.show", lambda *directories: 0)  # pictures take longer than all else
    budget = ["--seeds", "1", "--steps", "2", "--batch-size", "2", "--lr-grid", "1", "--quiet"]
    arguments = ["--task", "files", "--data-dir", str(data), *budget, "--out", str(tmp_path)]
    assert main(["compare", checkpoint, *arguments]) == 0
    config = json.loads((tmp_path / "comparison.json").read_text())["config"]
    expected = ["full", "lora", "prompt-tuning"]
    if kind == "Mamba2":
        expected += ["initial-state", "state-offset", "state-offset-y"]
    assert config["methods"] == expected
    cells = list(CellStore(tmp_path / "cells").records())
    assert len(cells) == 1 + len(expected) and {cell["status"] for cell in cells} == {"success"}


def test_a_method_that_does_not_fit_is_wrong_usage(kind, checkpoint, data, tmp_path, capsys):
    method = "additional-scan" if kind == "Mamba2" else "state-offset"
    arguments = ["--method", method, "--data", str(data / "train.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["train", checkpoint, *arguments]) == 2
    message = capsys.readouterr().err
    assert f"method {method!r} does not apply to" in message and "Methods that do: full, " in message

import json

import pytest
import torch

from ssmtune.cli.main import main
from ssmtune.config import RunConfig
from ssmtune.config_files import to_yaml
from ssmtune.generation import generate_texts
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.weights import save_weights


@pytest.fixture
def adapted(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "state-offset-y")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=20)
    return model.eval(), tokenizer


@pytest.fixture
def run(adapted, tmp_path):
    save_weights(adapted[0], tmp_path / "run/adapter")
    (tmp_path / "run/config.yaml").write_text(to_yaml(RunConfig()))
    return tmp_path / "run"


def generate(*arguments):
    return main(["generate", *map(str, arguments), "--max-new-tokens", "6"])


def test_run_and_adapter_directory_give_the_adapted_text(run, adapted, tiny_checkpoint, capsys):
    model, tokenizer = adapted
    expected = "the sea" + generate_texts(model, tokenizer, ["the sea"], 6)[0]
    for name in (run, run / "adapter"):
        assert generate(name, "--prompt", "the sea") == 0
        assert capsys.readouterr().out.rstrip("\n") == expected
    assert generate(tiny_checkpoint, "--prompt", "the sea") == 0
    base = capsys.readouterr().out
    assert base.rstrip("\n") != expected
    assert generate(run, "--base", "--prompt", "the sea") == 0
    assert capsys.readouterr().out == base


def test_several_prompts_are_taken_from_a_file(run, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("the sea\n\nthe sun is\n")
    assert generate(run, "--prompt-file", path) == 0
    together = capsys.readouterr().out
    assert generate(run, "--prompt", "the sea", "--prompt", "the sun is") == 0
    assert capsys.readouterr().out == together
    assert together.startswith("the sea") and "\n\nthe sun is" in together


def test_missing_and_empty_prompt_files_are_explained(run, tmp_path, capsys):
    assert generate(run, "--prompt-file", tmp_path / "none.txt") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert generate(run, "--prompt-file", tmp_path / "empty.txt") == 2
    assert "holds no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--temperature", "-1"], ["--top-p", "0"], ["--max-new-tokens", "0"], []])
def test_wrong_usage_ends_with_2(run, flags):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(run), *(["--prompt", "a"] if flags else []), *flags])
    assert stopped.value.code == 2


def truncate(run):
    file = run / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def shorten_header(run):
    (run / "adapter/adapter_model.safetensors").write_bytes(b"\x10")


def remove_weights(run):
    (run / "adapter/adapter_model.safetensors").unlink()


def leave_a_pickle(run):
    remove_weights(run)
    (run / "adapter/adapter_model.bin").write_bytes(b"\x80")


def break_config(run):
    (run / "adapter/adapter_config.json").write_text("{")


def change_config(run, **values):
    file = run / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "adapter_model.safetensors cannot be read"),
        (shorten_header, "adapter_model.safetensors cannot be read"),
        (remove_weights, "has no adapter_model.safetensors"),
        (leave_a_pickle, "only a pickle (adapter_model.bin), which can run code"),
        (break_config, "adapter_config.json is damaged"),
        (lambda run: change_config(run, peft_type="STATE_OFSET"), "unknown method 'STATE_OFSET'; did you mean"),
        (lambda run: change_config(run, base_model_name_or_path="mamba-5n"), "unknown model 'mamba-5n'"),
        (lambda run: change_config(run, base_model_name_or_path=None), "does not say which model"),
        (lambda run: change_config(run, target="h"), "lacks 2 of 2 tensors"),
    ],
)
def test_damaged_adapters_are_explained(run, capsys, damage, message):
    damage(run)
    assert generate(run, "--prompt", "a") in (1, 2)
    error = capsys.readouterr().err
    text = error[error.index("ssmtune: error:") :]
    assert message in text and 2 <= len(text.splitlines()) <= 4, text


def test_a_run_that_did_not_finish_is_explained(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    assert generate(tmp_path, "--prompt", "a") == 2
    assert f"ssmtune train --resume --out {tmp_path}" in capsys.readouterr().err


def test_a_directory_of_something_else_is_explained(tmp_path, capsys):
    assert generate(tmp_path, "--prompt", "a") == 2
    assert "it has no config.json" in capsys.readouterr().err

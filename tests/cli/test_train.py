import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from ssmtune.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "words.csv"
    path.write_text("word,meaning\n" + "".join(f"number {i},{'odd' if i % 2 else 'even'}\n" for i in range(20)))
    return str(path)


@pytest.fixture
def command(tiny_checkpoint, data):
    return [
        "train", tiny_checkpoint, "--method", "state-offset", "--data", data, "--data.template", "{word} is",
        "--data.target", "meaning", "--train.steps", "6", "--train.batch_size", "2", "--train.lr", "5e-3",
        "--eval.every", "3", "--eval.samples", "1", "--eval.max_new_tokens", "3", "--train.log_every", "2",
    ]  # fmt: skip


def test_train_fills_a_run_directory_and_says_what_is_next(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("State-offset Tuning (h), 1,024 of", "2 mixers -> ", "19 examples", "step 6/6  loss", "dev loss"):
        assert part in text, part
    assert text.splitlines()[-1] == f'next     ssmtune generate {out} --prompt "..."'
    assert json.loads((out / "summary.json").read_text())["result"]["steps"] == 6
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert stored["train"]["lr"] == 5e-3 and stored["method"]["name"] == "state-offset"


def test_a_task_brings_its_examples(tiny_checkpoint, tmp_path, capsys):
    for split, count in (("train", 8), ("dev", 3), ("test", 2)):
        rows = "".join(f"{split} {i},{'odd' if i % 2 else 'even'}\n" for i in range(count))
        (tmp_path / f"{split}.csv").write_text(f"prompt,completion\n{rows}")
    task = ["--task", "files", "--data-dir", str(tmp_path), "--data.limit", "7"]
    command = ["train", tiny_checkpoint, *task, "--train.steps", "1", "--eval.samples", "0"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "7 examples of" in (text := capsys.readouterr().out) and "dev 3" in text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["task"] == "files"
    assert main([*command, "--data", str(tmp_path / "train.csv")]) == 2
    assert "data.task is 'files', and data.path" in capsys.readouterr().err
    assert main(["train", tiny_checkpoint, "--task", "e2f"]) == 2
    assert "did you mean 'e2e'" in capsys.readouterr().err


def test_log_follows_the_run_in_another_program(command, tmp_path, monkeypatch, capsys):
    seen = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((state.global_step, logs))

    monkeypatch.setattr("ssmtune.cli.train.find_spec", lambda name: name)
    monkeypatch.setattr("transformers.integrations.get_reporting_integration_callbacks", lambda names: [Recorder])
    assert main([*command, "--log", "trackio", "--out", str(tmp_path / "run")]) == 0
    assert [step for step, logs in seen if "loss" in logs] == [2, 4, 6]
    assert any("dev_loss" in logs for _, logs in seen)


def test_log_that_is_not_installed_says_so_before_the_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ssmtune.cli.train.find_spec", lambda name: None)
    out = tmp_path / "run"
    assert main([*command, "--log", "wandb", "--out", str(out)]) == 2
    assert "wandb is not installed" in capsys.readouterr().err and not out.exists()


def test_stored_configuration_gives_the_same_run(command, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*command, "--out", str(first)]) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--out", str(second), "--quiet"]) == 0
    expected, actual = (load_file(out / "adapter/adapter_model.safetensors") for out in (first, second))
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_method_decides_the_learning_rate(command, tmp_path, capsys):
    at = command.index("--train.lr")
    command = command[:at] + command[at + 2 :]
    for method, rate in (("state-offset", "0.0002"), ("lora", "0.002")):
        assert main([*command, "--method", method, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
        assert f"rate {rate}\n" in capsys.readouterr().out


def test_dry_run_writes_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "memory   about" in text and "trainable" not in text and "dry run: nothing was written" in text
    assert yaml.safe_load(text.split("\nmodel    ")[0])["train"]["steps"] == 6


def test_existing_run_is_not_touched(command, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main([*command, "--out", str(out)]) == 2
    assert "already holds files" in capsys.readouterr().err
    assert main([*command, "--out", str(out), "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert main([*command, "--out", str(out)]) == 2
    assert "already holds a finished run" in capsys.readouterr().err


def test_ctrl_c_saves_and_resume_reaches_the_same_end(command, tmp_path, monkeypatch, capsys):
    from ssmtune.training_log import RunLog

    assert main([*command, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    begin, handler = RunLog.on_step_begin, signal.getsignal(signal.SIGINT)  # ignored in a job of a shell's background

    def interrupt(self, args, state, control, **more):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return begin(self, args, state, control, **more)

    out = tmp_path / "parts"
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "on_step_begin", interrupt)
        assert main([*command, "--out", str(out)]) == 130
    message = capsys.readouterr().err
    assert "interrupted after step 4" in message and f"ssmtune train --resume --out {out}" in message
    assert signal.getsignal(signal.SIGINT) is handler
    assert main(["train", "--resume", "--out", str(out)]) == 0
    expected, actual = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_resume_refuses_other_values(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    (out / "summary.json").unlink()
    assert main([*command, "--out", str(out), "--resume", "--train.lr", "1"]) == 2
    assert "there are other values for train.lr" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "needs to know which run" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (["--method", "loar"], "did you mean 'lora'"),
        (["--method.virtual_tokens", "3"], "'state-offset' has no option 'virtual_tokens'"),
        (["--train.steps", "many"], "train.steps: expected int, got 'many'"),
        (["--config", "mamba-5m/lorra"], "no built-in recipe of that name"),
    ],
)
def test_wrong_configuration_ends_with_2(command, tmp_path, capsys, change, message):
    assert main([*command, "--out", str(tmp_path / "run"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_model_is_answered_at_once(data, tmp_path, capsys):
    assert main(["train", "mamba-5n", "--data", data, "--out", str(tmp_path / "run")]) == 2
    assert "unknown model 'mamba-5n'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_data_is_answered_before_the_run_begins(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", tiny_checkpoint, "--out", str(out)]) == 2
    assert "data.path is not set" in capsys.readouterr().err
    assert main(["train", tiny_checkpoint, "--out", str(out), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not out.exists()


def test_unknown_flag_is_an_error_of_argparse(command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--train.step", "3"])
    assert stopped.value.code == 2


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv[0] = 'ssmtune'\n"
        "from ssmtune.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SSMTUNE_LAZY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--train.gradient_checkpointing" in done.stdout and "--method.rank" in done.stdout


def test_full_fine_tuning_leaves_a_model(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command, "--method", "full", "--out", str(out)]) == 0
    assert (out / "model/model.safetensors").is_file() and (out / "model/tokenizer.json").is_file()
    assert main(["generate", str(out), "--prompt", "number 3 is", "--max-new-tokens", "2"]) == 0
    assert main(["generate", str(out), "--base", "--prompt", "number 3 is", "--max-new-tokens", "2"]) == 0


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(command, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541", "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*torchrun, "ssmtune", *command, "--out", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done     6 steps") == 1 and "steps    6 of 4 examples" in done.stdout
    assert main([*command, "--train.batch_size", "4", "--out", str(tmp_path / "one"), "--quiet"]) == 0
    results = [json.loads((tmp_path / name / "summary.json").read_text())["result"] for name in ("one", "two")]
    for key in ("train_loss", "dev_loss"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-6)

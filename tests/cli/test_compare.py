import argparse
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

from ssmtune.cli.compare import add_parser, resolve
from ssmtune.cli.main import main


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="verb"))
    return parser.parse_args(["compare", *arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Mamba with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0, eos_token_id=0
    )
    MambaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """(directory of a comparison made by the command line, the arguments)"""
    folder = tmp_path_factory.mktemp("compare")
    for split in ("train", "dev", "test"):
        rows = [{"prompt": f"{split} {i}", "completion": f"is {i}"} for i in range(6)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "compare",
        str(checkpoint),
        "--task",
        "files",
        "--data-dir",
        str(folder),
        "--methods",
        "lora,state-offset-y",
        "--seeds",
        "2",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--lr-grid",
        "1",
        "--out",
        str(folder / "out"),
    ]
    assert main(arguments) == 0
    return folder / "out", arguments


def test_resolve_lays_flags_over_the_preset():
    config = resolve(parsed("m", "--preset", "demo", "--steps", "7", "--methods", "lora, full", "--lr-grid", "0.5,2"))
    assert (config.model, config.steps, config.methods, config.lr_factors) == ("m", 7, ["lora", "full"], [0.5, 2.0])
    assert config.seeds == resolve(parsed("--preset", "demo")).seeds >= 2
    config = resolve(parsed("--steps", "7,sst2=9"))
    assert (config.steps, config.task_steps) == (7, {"sst2": 9})
    assert resolve(parsed("--steps", "sst2=9")).steps == resolve(parsed()).steps
    assert resolve(parsed("--limit", "5")).limit == {"train": 5, "dev": 5, "test": 5}
    assert resolve(parsed("--limit", "train=9,test=3")).limit == {"train": 9, "test": 3}
    assert resolve(parsed("--limit", "train=9,5")).limit == {"train": 9, "dev": 5, "test": 5}


def test_measures_are_chosen():
    assert resolve(parsed()).measures == ["forgetting", "length", "ood", "switching"]
    assert resolve(parsed("--measure", "none")).measures == []
    config = resolve(parsed("--measure", "ood,length", "--text", "held_out.jsonl", "--ood-task", "sst2"))
    assert (config.measures, config.text, config.ood_task) == (["ood", "length"], "held_out.jsonl", "sst2")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--measure", "forgeting"], "measure 'forgeting' is unknown; did you mean 'forgetting'"),
        (["--ood-task", "sst"], "task 'sst' is unknown; did you mean 'sst2'"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt does not exist"),
        (["--processes", "0"], "processes: expected at least 1, got 0"),
        (["--methods", "lorra"], "method 'lorra' is unknown; did you mean 'lora'"),
        (["--task", "docstring-pakage"], "task 'docstring-pakage' is unknown; did you mean 'docstring-package'"),
        (["--limit", "tran=5"], "limit has 'tran', which is none of the splits; did you mean 'train'"),
        (["--limit", "all=5"], "limit has 'all', which is none of the splits: train, dev, test"),
        (["--limit", "dev=0"], "limit of dev: expected at least 1, got 0"),
        (["--limit", "many"], "--limit: 'many' is not understood: it is neither N nor NAME=N"),
        (["--limit", "=5"], "'=5' is not understood: it is neither"),
        (["--limit", "dev=5,dev=6"], "'dev=6' is not understood: another number is given for the same"),
        (["--steps", "5,6"], "'6' is not understood: another number is given for the same"),
        (["--steps", "sst2=few"], "--steps: 'sst2=few' is not understood"),
        (["--steps", "sst=9"], "task_steps has 'sst', which is none of the tasks"),
        (["--lr-grid", "fast"], "expected numbers such as 0.333,1,3, got 'fast'"),
        (["--task", "e2e"], "no --data-dir was given"),
        (["--task", "e2e", "--data-dir", "/nowhere"], "--data-dir /nowhere does not exist"),
        (["no-such-model"], "unknown model 'no-such-model'"),
    ],
)
def test_wrong_usage_is_named_with_exit_status_2(arguments, message, capsys, tmp_path):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_does_not_import_torch():
    code = (
        "import sys; from ssmtune.cli.main import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'rich' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "SSMTUNE_LAZY": "1"}
    )
    assert done.stderr.split() == ["False", "False"]
    assert "docstring-continuation" in done.stdout and "ssmtune report" in done.stdout


def test_compare_ends_with_the_table_the_report_and_the_next_command(finished, capsys):
    out, arguments = finished
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert re.search(r"State-offset Tuning \(y\) +[\d.]+ ± [\d.]+ ", text)
    assert "6 to train on, 6 dev, 6 test" in text and "every method's default times 1, no search" in text
    assert (out / "report.html").is_file() and f"{out / 'report.md'}" in text
    command = shlex.split(text.splitlines()[-1])
    assert command[:3] == ["next", "ssmtune", "generate"]
    assert main([*command[2:], "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("dev 0")


def test_report_trains_nothing(finished, capsys, monkeypatch):
    out, _ = finished
    (out / "report.md").unlink()

    def refuse(*args, **kwargs):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("ssmtune.models.load_model", refuse)
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").is_file() and "State-offset Tuning (y)" in capsys.readouterr().out


def test_report_joins_several_and_refuses_what_is_no_comparison(finished, capsys, tmp_path):
    out, _ = finished
    assert main(["report", str(out), str(out), "--out", str(tmp_path / "both")]) == 0
    assert (
        tmp_path / "both" / "report.html"
    ).is_file() and f"{tmp_path / 'both' / 'report.md'}" in capsys.readouterr().out
    assert main(["report", str(out), str(out)]) == 2
    assert main(["report", "/nowhere"]) == 2
    assert "is not the directory of a comparison" in capsys.readouterr().err


def test_another_comparison_in_out_is_refused(finished, capsys):
    _, arguments = finished
    assert main([*arguments, "--steps", "3"]) == 2
    assert "steps of files: 2 there, 3 now" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(finished, capsys, monkeypatch, tmp_path):
    _, arguments = finished
    arguments = [*arguments[:-1], str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ssmtune", *arguments])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssmtune.cell_runs.train", interrupted)
    assert main(arguments) == 130
    assert f"To go on: ssmtune {shlex.join(arguments)}" in capsys.readouterr().err


def test_no_method_at_all_is_exit_status_1(finished, capsys, monkeypatch, tmp_path):
    _, arguments = finished

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("ssmtune.cell_runs.train", broken)
    assert main([*arguments[:-1], str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "run failed: out of luck" in captured.out and "no method could be trained" in captured.err

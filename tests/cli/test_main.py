import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssmtune
from ssmtune.cli import env
from ssmtune.cli.main import VERBS, main
from ssmtune.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "peft", "numpy", "triton", "matplotlib"}


def run(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("arguments", [["--help"], *[[verb, "--help"] for verb in VERBS]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments, tmp_path):
    code = f"""
import sys
sys.argv = ["ssmtune", *{arguments!r}]
from ssmtune.cli.main import main
try:
    main()
finally:
    print("HEAVY", sorted({HEAVY!r} & set(sys.modules)))
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert done.stdout.startswith("usage: ssmtune")
    assert "examples:\n" in done.stdout


def test_module_answers_without_torch(tmp_path):
    # torch made impossible to import: importing it would fail, not just be slow
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = run("-m", "ssmtune", "--help", cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"\n    {verb} " in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"ssmtune {ssmtune.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["env", "--yaml"]], ids=["nothing", "verb", "option"])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: ssmtune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("config is not valid:\n  train.step: unknown key; did you mean 'steps'?"), 2),
        (ValueError("A has shape (1,)"), 1),
        (RuntimeError("no GPU found"), 1),
        (FileNotFoundError(2, "No such file or directory", "poems.jsonl"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_errors_become_a_message_and_a_status(error, status, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(env, "run", fail)
    assert main(["env"]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert str(error) in printed.err
    assert printed.err.count("\n") == str(error).count("\n") + 1


def test_missing_package_comes_with_a_remedy(monkeypatch, capsys):
    def fail(args):
        raise ModuleNotFoundError("No module named 'sacrebleu.metrics'", name="sacrebleu.metrics")

    monkeypatch.setattr(env, "run", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == (
        "ssmtune: error: sacrebleu.metrics is not installed.\n  Run `pip install sacrebleu`.\n"
    )


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(args):
        raise ValueError("A has shape (1,)")

    monkeypatch.setattr(env, "run", fail)
    assert main(["env", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_programming_errors_are_not_hidden(monkeypatch):
    def fail(args):
        raise KeyError("state")

    monkeypatch.setattr(env, "run", fail)
    with pytest.raises(KeyError):
        main(["env"])


def test_reader_that_leaves_early(tmp_path):
    code = """
import sys
from ssmtune.cli import env, main
env.run = lambda args: print("x" * 1_000_000) or 0
sys.exit(main.main(["env"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SSMTUNE_LAZY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_mistyped_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--train.step", "3"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --train.step; did you mean '--train.steps'?" in capsys.readouterr().err

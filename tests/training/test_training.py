import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ssmtune.config import ConfigError, EvalConfig, TrainConfig
from ssmtune.data import Example
from ssmtune.generation import target_log_likelihood
from ssmtune.methods import METHODS, apply_method
from ssmtune.models import load_model
from ssmtune.stored_adapters import load_trained
from ssmtune.trainer import ExampleOrder
from ssmtune.training import TrainingInterrupted, train

EXAMPLES = [Example(f"number {i} is", " even" if i % 2 == 0 else " odd") for i in range(24)]
DEV = [Example(f"number {i} is", " even" if i % 2 == 0 else " odd") for i in range(24, 29)]
CONFIG = TrainConfig(steps=12, batch_size=3, lr=5e-3, log_every=2, save_every=4)
EVALUATION = EvalConfig(every=4, samples=1, max_new_tokens=3)


def run(checkpoint, out, method="lora", config=CONFIG, options=None, dev=DEV, **more):
    model, tokenizer = load_model(checkpoint)
    model = apply_method(model, method, options, config.seed)
    result = train(model, tokenizer, EXAMPLES, dev, config, out, evaluation=EVALUATION, progress=False, **more)
    return model, tokenizer, result


def tensors(out: Path):
    folder = out / "adapter" if (out / "adapter").is_dir() else out / "model"
    name = "adapter_model.safetensors" if folder.name == "adapter" else "model.safetensors"
    return load_file(folder / name)


def assert_same(first: Path, second: Path):
    expected, actual = tensors(first), tensors(second)
    assert expected.keys() == actual.keys() and expected
    for key in expected:
        assert torch.equal(expected[key], actual[key]), key


def lines(out: Path):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second")} for row in rows]


class At(TrainerCallback):
    """Call something at the end of one step, before the run decides what to do there."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            self.action()


@pytest.mark.parametrize("method", METHODS)
def test_training_helps_and_the_saved_weights_are_those_in_memory(tiny_checkpoint, tmp_path, method):
    def likelihoods(model, tokenizer):
        return target_log_likelihood(model, tokenizer, [e.prompt for e in EXAMPLES], [e.target for e in EXAMPLES])

    model, tokenizer = load_model(tiny_checkpoint)
    before = likelihoods(apply_method(model, method), tokenizer)
    config = dataclasses.replace(CONFIG, lr=METHODS[method].default_lr * 5)
    model, tokenizer, result = run(tiny_checkpoint, tmp_path, method, config)
    after = likelihoods(model, tokenizer)
    assert sum(score.log_likelihood for score in after) > sum(score.log_likelihood for score in before)
    assert likelihoods(*load_trained(str(tmp_path))) == after


def test_tiny_model_learns_its_examples_by_heart(tiny_checkpoint):
    config = TrainConfig(steps=60, batch_size=8, lr=2e-2)
    _, _, result = run(tiny_checkpoint, None, "full", config, dev=[])
    assert result.train_loss < 0.4 and result.dev_loss is None


def test_dev_loss_is_the_mean_over_target_tokens(tiny_checkpoint):
    model, tokenizer, result = run(tiny_checkpoint, None)
    scores = target_log_likelihood(
        model, tokenizer, [e.prompt for e in DEV], [e.target for e in DEV], batch_size=1, add_eos=True
    )
    expected = -sum(s.log_likelihood for s in scores) / sum(s.tokens for s in scores)
    assert result.dev_loss == pytest.approx(expected, rel=1e-6)


def test_accumulated_batches_are_one_batch(tiny_checkpoint, assert_close):
    whole = run(tiny_checkpoint, None, config=dataclasses.replace(CONFIG, batch_size=4))
    parts = run(tiny_checkpoint, None, config=dataclasses.replace(CONFIG, batch_size=2, accumulation=2))
    for (name, expected), actual in zip(whole[0].named_parameters(), parts[0].parameters(), strict=True):
        assert_close(name, expected, actual, 1e-3)
    assert parts[2].train_loss == pytest.approx(whole[2].train_loss, rel=1e-4)


def test_two_runs_are_the_same_and_another_seed_is_not(tiny_checkpoint, tmp_path):
    options = {"dropout": 0.3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))
        run(tiny_checkpoint, tmp_path / name, config=dataclasses.replace(CONFIG, seed=seed), options=options)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", tmp_path / "c")


def test_every_method_sees_the_same_order():
    first = list(ExampleOrder(5, 13, 3))
    assert first == list(ExampleOrder(5, 13, 3)) != list(ExampleOrder(5, 13, 4))
    assert sorted(first[:5]) == sorted(first[5:10]) == [0, 1, 2, 3, 4] and len(first) == 13


def test_run_directory_holds_what_it_promises(tiny_checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    _, _, result = run(tiny_checkpoint, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "samples.md",
        "summary.json",
    ]
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "dev_loss" in row] == [4, 8, 12]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["result"]["dev_loss"] == result.dev_loss == rows[-1]["dev_loss"]
    assert summary["environment"]["packages"]["peft"]
    assert (tmp_path / "samples.md").read_text().count("## step") == 3
    assert result.trainable_parameters < result.total_parameters
    assert result.peak_memory_bytes > 0 and result.tokens_per_second > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_without_a_directory(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_checkpoint, None)
    assert list(tmp_path.iterdir()) == []


def test_best_weights_are_kept(tiny_checkpoint, tmp_path):
    # a rate that ruins the model after it was good
    config = dataclasses.replace(CONFIG, keep="best", lr=0.5, warmup=1.0)
    model, tokenizer, result = run(tiny_checkpoint, tmp_path, "full", config)
    dev = {row["step"]: row["dev_loss"] for row in result.curve if "dev_loss" in row}
    best = min(dev, key=dev.get)
    assert best < 12 and (result.kept_step, result.dev_loss) == (best, dev[best])
    again, _ = load_trained(str(tmp_path))
    scores = target_log_likelihood(again, tokenizer, [e.prompt for e in DEV], [e.target for e in DEV], add_eos=True)
    assert -sum(s.log_likelihood for s in scores) / sum(s.tokens for s in scores) == pytest.approx(dev[best], rel=1e-5)


@pytest.mark.parametrize(
    "method, keep",
    [
        ("lora", "best"),
        ("prompt-tuning", "last"),
        ("state-offset", "last"),
        ("full", "best"),
        ("bitfit", "best"),
        ("p-tuning", "last"),
        ("lora+state-offset", "best"),
        ("prefix-tuning", "last"),
        ("lora+sdt", "best"),
    ],
)
def test_interrupted_run_resumes_to_the_same_weights(tiny_checkpoint, tmp_path, method, keep):
    config = dataclasses.replace(CONFIG, keep=keep)
    options = {"lora": {"dropout": 0.3}, "lora+sdt": {"warm_up_steps": 3}}.get(method)
    run(tiny_checkpoint, tmp_path / "whole", method, config, options)
    interrupt = At(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted) as stopped:
        run(tiny_checkpoint, tmp_path / "parts", method, config, options, callbacks=[interrupt])
    assert stopped.value.step == 7 and stopped.value.checkpoint.name == "step-00000007"
    assert not (tmp_path / "parts/summary.json").exists()
    torch.rand(5)
    _, _, result = run(tiny_checkpoint, tmp_path / "parts", method, config, options, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [row for row in whole if "dev_loss" in row] == [row for row in parts if "dev_loss" in row]
    assert [row["step"] for row in whole] == [row["step"] for row in parts]
    assert (tmp_path / "whole/samples.md").read_text() == (tmp_path / "parts/samples.md").read_text()
    assert result.steps == 12


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import test_training as t
from pathlib import Path
save, calls = torch.save, []
def die(*arguments, **options):
    calls.append(1)
    if len(calls) == 5:  # while the optimizer of the second checkpoint is written
        save(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*arguments, **options)
torch.save = die
torch.set_num_threads(1)
t.run({checkpoint!r}, Path({out!r}), options={{"dropout": 0.3}})
"""


def test_killed_run_resumes_to_the_same_weights(tiny_checkpoint, tmp_path):
    run(tiny_checkpoint, tmp_path / "whole", options={"dropout": 0.3})
    out = tmp_path / "parts"
    script = KILLED.format(tests=str(Path(__file__).parent), checkpoint=tiny_checkpoint, out=str(out))
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [".new.partial", "step-00000004"]
    assert not (out / "adapter").exists()
    run(tiny_checkpoint, out, options={"dropout": 0.3}, resume=True)
    assert_same(tmp_path / "whole", out)
    assert lines(tmp_path / "whole") == lines(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000012"]


def test_full_disk_leaves_the_checkpoint_before(tiny_checkpoint, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_checkpoint, tmp_path / "parts")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000004"]
    assert not list((tmp_path / "parts").glob("adapter*"))
    run(tiny_checkpoint, tmp_path / "parts", resume=True)
    run(tiny_checkpoint, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "parts")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainable.safetensors"])
def test_foreign_checkpoint_is_refused_and_runs_no_code(tiny_checkpoint, tmp_path, file):
    out = tmp_path / "run"
    with pytest.raises(TrainingInterrupted) as stopped:
        run(tiny_checkpoint, out, callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    torch.save(Trap(tmp_path / "trapped"), stopped.value.checkpoint / file)
    with pytest.raises(ValueError, match="step-00000003 cannot be read") as caught:
        run(tiny_checkpoint, out, resume=True)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "trapped").exists()


def test_resuming_with_other_settings_is_refused(tiny_checkpoint, tmp_path):
    run(tiny_checkpoint, tmp_path)
    with pytest.raises(ConfigError, match=r"other settings: lr \(0.005 then, 0.001 now\)"):
        run(tiny_checkpoint, tmp_path, config=dataclasses.replace(CONFIG, lr=1e-3), resume=True)
    with pytest.raises(ConfigError, match="other settings: trainable tensors"):
        run(tiny_checkpoint, tmp_path, options={"rank": 3}, resume=True)
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "lora")
    with pytest.raises(ConfigError, match="other settings: data"):
        train(model, tokenizer, EXAMPLES[1:], DEV, CONFIG, tmp_path, resume=True, progress=False)


def test_diverging_run_stops_with_step_and_rate(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "full")

    def ruin():
        with torch.no_grad():
            model.backbone.norm_f.weight.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"the loss became nan at step 6 \(learning rate 3.18e-03\)") as caught:
        train(model, tokenizer, EXAMPLES, [], CONFIG, tmp_path, callbacks=[At(5, ruin)], progress=False)
    assert "--train.lr" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_infinite_gradient_stops_before_the_step(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "full")
    before = model.backbone.norm_f.weight.detach().clone()
    model.backbone.norm_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RuntimeError, match="a gradient became nan at step 1"):
        train(model, tokenizer, EXAMPLES, [], CONFIG, None, progress=False)
    assert torch.equal(before, model.backbone.norm_f.weight)


def test_dead_tensors_are_warned_of(tiny_checkpoint, capsys):
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "lora")
    model.unused = torch.nn.Parameter(torch.zeros(3))
    train(model, tokenizer, EXAMPLES, [], TrainConfig(steps=1, batch_size=2, lr=1e-3), None)
    assert "warning: 1 of 13 trainable tensors received no gradient" in capsys.readouterr().out


def test_learning_rate_must_be_known(tiny_checkpoint):
    with pytest.raises(ConfigError, match="train.lr is not set"):
        run(tiny_checkpoint, None, config=TrainConfig())


def test_cut_examples_are_reported(tiny_checkpoint, capsys):
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "state-offset")
    config = TrainConfig(steps=1, batch_size=2, lr=1e-3)
    train(model, tokenizer, EXAMPLES, [], config, None, max_length=8)
    assert "warning: training data: max_length=8 cut the beginning of 24 prompts" in capsys.readouterr().out


def test_gradient_checkpointing_gives_the_same_weights(tiny_checkpoint, assert_close):
    plain, _, _ = run(tiny_checkpoint, None, "state-offset")
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True)
    recomputed, _, _ = run(tiny_checkpoint, None, "state-offset", config)
    for (name, expected), actual in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if expected.requires_grad:
            assert_close(name, expected, actual, 1e-4)


def test_autocast_trains_in_bfloat16_and_leaves_weights_and_evaluation_in_float32(tiny_checkpoint, tmp_path):
    seen = []
    model, tokenizer = load_model(tiny_checkpoint)
    model = apply_method(model, "state-offset")
    projection = next(module for name, module in model.named_modules() if name.endswith("in_proj"))
    projection.register_forward_hook(lambda module, inputs, out: seen.append((torch.is_grad_enabled(), out.dtype)))
    config = dataclasses.replace(CONFIG, autocast=True)
    result = train(model, tokenizer, EXAMPLES, DEV, config, None, evaluation=EVALUATION, progress=False)
    assert (True, torch.bfloat16) in seen and {dtype for graded, dtype in seen if not graded} == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    _, _, exact = run(tiny_checkpoint, None, "state-offset")
    assert result.train_loss == pytest.approx(exact.train_loss, rel=0.02) and result.train_loss != exact.train_loss

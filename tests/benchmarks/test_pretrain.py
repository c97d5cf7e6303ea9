"""Pre-training stops, goes on and exports; on a corpus and a model of a few kilobytes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from benchmarks import pretrain
from benchmarks.base_models import ARCHITECTURES, build_model

STEPS = 8


@pytest.fixture
def small(monkeypatch):
    def build_model(architecture):
        torch.manual_seed(0)
        return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4))

    for name, value in {"VOCAB_SIZE": 300, "SEQLEN": 32, "BATCH": 2, "HELD_OUT_ARTICLES": 4}.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "build_model", build_model)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "articles.jsonl"
    articles = [{"title": f"Article {i}", "text": f"The number {i} comes before {i + 1}. " * 20} for i in range(40)]
    path.write_text("\n".join(json.dumps(article) for article in articles))
    return path


def run(out, corpus):
    out.mkdir(exist_ok=True)
    pretrain.prepare(corpus, out)
    pretrain.train("mamba", out, tokens_wanted=STEPS * 2 * 32, checkpoint_minutes=60)
    return load_file(out / "mamba/checkpoint" / "model.safetensors")


def test_an_interrupted_run_ends_like_an_uninterrupted_one(small, corpus, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", corpus)

    batch_of, interrupted = pretrain.batch_of, []

    def interrupting(tokens, step):
        if step == 5 and not interrupted:
            interrupted.append(step)
            raise KeyboardInterrupt
        return batch_of(tokens, step)

    monkeypatch.setattr(pretrain, "batch_of", interrupting)
    stopped = run(tmp_path / "parts", corpus)
    assert json.loads((tmp_path / "parts/mamba/checkpoint/state.json").read_text())["step"] == 5
    resumed = run(tmp_path / "parts", corpus)
    assert any(not torch.equal(stopped[name], whole[name]) for name in whole)
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


def test_a_kill_between_the_renames_of_a_checkpoint_loses_nothing(small, corpus, tmp_path):
    run(tmp_path / "run", corpus)
    out = tmp_path / "run/mamba"
    (out / "checkpoint").rename(out / "checkpoint.old")
    assert pretrain.load_checkpoint(out, pretrain.build_model("mamba")) == STEPS


def test_export_is_a_half_precision_checkpoint_with_a_measured_card(small, corpus, tmp_path):
    run(tmp_path / "run", corpus)
    pretrain.export("mamba", tmp_path / "run", tmp_path / "model")
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float16}
    card = (tmp_path / "model/README.md").read_text()
    assert "36 English Wikipedia articles" not in card and "40 English Wikipedia articles" in card
    assert f"{STEPS * 2 * 32:,}" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model(tokenizer("The number", return_tensors="pt").input_ids).logits.isfinite().all()


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    steps = 10 * pretrain.WARMUP_STEPS
    rates = [pretrain.learning_rate(step, steps) for step in range(steps + 1)]
    assert rates[0] == pytest.approx(pretrain.PEAK_LR / pretrain.WARMUP_STEPS)
    assert rates[steps // 2] == pretrain.PEAK_LR
    assert rates[-1] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_models_have_the_size_of_the_first_within_3_percent(architecture):
    size, first = (build_model(name).num_parameters() for name in (architecture, "mamba"))
    assert abs(size / first - 1) < 0.03

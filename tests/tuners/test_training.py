"""Training adapters with what transformers offers for it."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from ssmtune.tuners import StateOffsetConfig


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(1, 64, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, examples, folder, **kwargs):
    arguments = dict(learning_rate=0.05, max_steps=4, per_device_train_batch_size=2, save_steps=2, logging_steps=1)
    arguments |= dict(report_to=[], use_cpu=True, disable_tqdm=True, seed=0)
    resume = kwargs.pop("resume_from_checkpoint", None)
    trainer = Trainer(model, TrainingArguments(folder, **arguments | kwargs), train_dataset=examples)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_lowers_the_loss_and_leaves_the_base_alone(tiny_mamba, make_state_config, examples, tmp_path):
    base = copy.deepcopy(tiny_mamba.state_dict())
    model = get_peft_model(tiny_mamba, make_state_config(task_type="CAUSAL_LM"))
    trainer = train(model, examples[:2], tmp_path, max_steps=12, save_strategy="no")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[key], tensor) for key, tensor in base.items())


def test_trainer_resumes_from_a_checkpoint(tiny_mamba, make_config, examples, tmp_path):
    models = [get_peft_model(copy.deepcopy(tiny_mamba), make_config(task_type="CAUSAL_LM")) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train(models[0], examples, tmp_path)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    train(models[1], examples, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole, resumed = map(trainable, models)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_trainer_takes_back_the_best_checkpoint(tiny_mamba, examples, tmp_path):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(task_type="CAUSAL_LM"))
    # the highest loss counts as the best, so that it is not the last
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.05, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1] + 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tiny_mamba, make_config, make_nonzero, input_ids, use_reentrant):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config(task_type="CAUSAL_LM"))).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_training_under_autocast(tiny_mamba, make_config, input_ids):
    model = get_peft_model(tiny_mamba, make_config(task_type="CAUSAL_LM"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

"""Training a tensor through an MLP, and the plain tensor that is stored."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import MambaForCausalLM, Trainer, TrainingArguments

from ssmtune import check_gradients
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig, StateOffsetLayer

PLAIN = {
    "offset-h": lambda **kwargs: StateOffsetConfig(task_type="CAUSAL_LM", **kwargs),
    "offset-y": lambda **kwargs: StateOffsetConfig(task_type="CAUSAL_LM", target="y", **kwargs),
    "initial": lambda **kwargs: InitialStateConfig(task_type="CAUSAL_LM", **kwargs),
    "initial-conv": lambda **kwargs: InitialStateConfig(task_type="CAUSAL_LM", conv_state=True, **kwargs),
}


@pytest.fixture(params=PLAIN.values(), ids=PLAIN.keys())
def config(request):
    return request.param


@pytest.fixture
def fresh(tiny_mamba, tmp_path):
    """A function that gives the base model anew."""
    tiny_mamba.save_pretrained(tmp_path / "base")
    return lambda: MambaForCausalLM.from_pretrained(tmp_path / "base")


def test_starts_as_the_base_and_trains_every_tensor_of_the_mlp(tiny_mamba, config, input_ids, logits):
    base = logits(tiny_mamba, input_ids)
    model = get_peft_model(tiny_mamba, config(reparametrize=5))
    torch.testing.assert_close(logits(model, input_ids), base)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(f"{model.base_model.prefix}mlp.default." in name for name in trainable)
    assert check_gradients(model, {"input_ids": input_ids, "labels": input_ids}).ok


def test_the_tensor_is_what_the_formula_gives(tiny_mamba, make_nonzero):
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(reparametrize=5)))
    layer = next(m for m in model.modules() if isinstance(m, StateOffsetLayer))
    mlp = layer.mlps("default")["h"]
    hidden = torch.tanh(mlp.embedding @ mlp.inner.weight.T + mlp.inner.bias)
    expected = (hidden @ mlp.outer.weight.T + mlp.outer.bias).T
    assert expected.shape == (64, 8)
    torch.testing.assert_close(layer.state_inputs().state_offset, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.state_inputs().state_offset, expected)


def test_stored_as_a_plain_adapter(fresh, config, make_nonzero, tmp_path, input_ids, logits):
    model = make_nonzero(get_peft_model(fresh(), config(reparametrize=5))).eval()
    model.save_pretrained(tmp_path / "mlp")
    get_peft_model(fresh(), config()).save_pretrained(tmp_path / "plain")
    stored, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mlp", "plain"))
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in plain.items()}
    assert all(tensor.any() for tensor in stored.values())
    stored, plain = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("mlp", "plain"))
    assert stored == plain
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "mlp")
    torch.testing.assert_close(logits(loaded, input_ids), logits(model, input_ids))
    assert model.active_peft_config.reparametrize == 5


def test_loading_into_it_gives_the_stored_tensor(fresh, config, make_nonzero, tmp_path, input_ids, logits):
    model = make_nonzero(get_peft_model(fresh(), config(reparametrize=5))).eval()
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path / "adapter")
    make_nonzero(model, seed=2)
    assert (logits(model, input_ids) - expected).abs().max() > 1e-3
    result = model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert not result.missing_keys
    torch.testing.assert_close(logits(model, input_ids), expected)
    assert check_gradients(model, {"input_ids": input_ids, "labels": input_ids}).ok


def test_only_the_mlp_trains_after_switching(tiny_mamba, config):
    model = get_peft_model(tiny_mamba, config(reparametrize=5))
    model.add_adapter("plain", config())
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_adapter("plain")
    assert all(name.endswith(".plain") for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.set_requires_grad("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    model.delete_adapter("default")
    assert not any(".default" in name for name, _ in model.named_parameters())


def test_trainer_takes_back_the_best_checkpoint(tiny_mamba, input_ids, tmp_path):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(task_type="CAUSAL_LM", reparametrize=4))
    # the highest loss counts as the best, so that it is not the last
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.05, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    examples = [{"input_ids": row, "labels": row} for row in input_ids]
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1] + 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


def test_trainer_resumes_from_the_stored_tensor(fresh, input_ids, tmp_path, logits):
    examples = [{"input_ids": row, "labels": row} for row in input_ids]
    models = [get_peft_model(fresh(), StateOffsetConfig(task_type="CAUSAL_LM", reparametrize=4)) for _ in range(2)]
    for model, steps in zip(models, (2, 3), strict=True):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, learning_rate=0.05, lr_scheduler_type="constant", save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if steps == 3 else None)
    plain = PeftModel.from_pretrained(fresh(), tmp_path / "checkpoint-2")
    start, trained, resumed = (logits(model.eval(), input_ids) for model in (plain, *models))
    torch.testing.assert_close(start, trained)
    assert trainer.state.global_step == 3 and (resumed - start).abs().max() > 1e-6


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_stays_float32_in_a_half_model(tiny_mamba, input_ids, autocast_adapter_dtype):
    model = tiny_mamba.bfloat16()
    config = InitialStateConfig(reparametrize=3)
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).bfloat16()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=input_ids, labels=input_ids).loss.backward()


def test_compiles_without_graph_breaks(tiny_mamba, make_nonzero, input_ids):
    model = make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(reparametrize=3, conv_state=True)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=input_ids).logits, model(input_ids=input_ids).logits)

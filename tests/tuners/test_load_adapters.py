"""Many adapters of one method, loaded in one call."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import ssmtune
from ssmtune.tuners import StateOffsetConfig

NAMES = ["first", "second", "third"]


def store(base, folder, configs, make_nonzero):
    """One adapter for each of NAMES, each with noise of its own, in a folder of its name."""
    for seed, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        model = make_nonzero(get_peft_model(copy.deepcopy(base), config), seed)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def refuse_peft(monkeypatch):
    """Let peft's way of loading a further adapter fail."""
    load = PeftModel.load_adapter

    def refuse(self, folder, name, *args, **kwargs):
        assert name == NAMES[0], "peft was asked to load an adapter beside another"
        return load(self, folder, name, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "load_adapter", refuse)


def test_adapters_are_those_that_peft_loads(
    tiny_mamba, make_state_config, make_nonzero, input_ids, logits, tmp_path, request
):
    folder = store(tiny_mamba, tmp_path, [make_state_config(task_type="CAUSAL_LM") for _ in NAMES], make_nonzero)
    expected = PeftModel.from_pretrained(copy.deepcopy(tiny_mamba), folder / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        expected.load_adapter(folder / name, name)
    request.getfixturevalue("refuse_peft")
    model = ssmtune.load_adapters(tiny_mamba, folder)
    assert list(model.peft_config) == NAMES and model.active_adapters == NAMES[:1]
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == {
        name: config.to_dict() for name, config in expected.peft_config.items()
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tensors = dict(model.named_parameters())
    assert tensors.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(tensors[name], parameter) for name, parameter in expected.named_parameters())
    rows = input_ids[:1].expand(3, -1)
    together = logits(model, rows, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        expected.set_adapter(name)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, input_ids), logits(expected, input_ids))
        torch.testing.assert_close(together[row], logits(expected, input_ids[:1])[0])
    model.delete_adapter("second")
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*/")} == {"first", "third"}


def test_files_may_go_once_they_are_loaded(tiny_mamba, make_nonzero, tmp_path, refuse_peft):
    folder = store(tiny_mamba, tmp_path, [StateOffsetConfig() for _ in NAMES], make_nonzero)
    model = ssmtune.load_adapters(tiny_mamba, folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in NAMES:
        path = folder / name / "adapter_model.safetensors"
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_other_configs_beside_them(tiny_mamba, make_nonzero, input_ids, logits, tmp_path):
    configs = [StateOffsetConfig(), StateOffsetConfig(rank=2), StateOffsetConfig(layers_to_transform=[1])]
    folder = store(tiny_mamba, tmp_path, configs, make_nonzero)
    model = ssmtune.load_adapters(copy.deepcopy(tiny_mamba), folder)
    for name in NAMES:
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(copy.deepcopy(tiny_mamba), folder / name)
        torch.testing.assert_close(logits(model, input_ids), logits(alone, input_ids))


def with_nan(tensors):
    next(iter(tensors.values()))[0] = float("nan")


def without_one(tensors):
    tensors.pop(next(iter(tensors)))


def of_other_size(tensors):
    key = next(iter(tensors))
    tensors[key] = torch.zeros(63, 8)


@pytest.mark.parametrize(
    "damage, words",
    [
        (with_nan, ["holds 8 values", "NaN or infinite"]),
        (without_one, ["lacks 1 of 2 tensors"]),
        (of_other_size, ["has shape (63, 8)", "this model needs (64, 8)"]),
    ],
)
def test_errors_name_the_adapter(tiny_mamba, make_nonzero, tmp_path, damage, words):
    folder = store(tiny_mamba, tmp_path, [StateOffsetConfig() for _ in NAMES], make_nonzero)
    file = folder / "second" / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        ssmtune.load_adapters(tiny_mamba, folder)
    message = str(error.value)
    assert message.startswith("adapter 'second': ") and all(word in message for word in words), message
    assert len(message.splitlines()) <= 4

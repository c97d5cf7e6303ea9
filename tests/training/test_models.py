import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ssmtune import models
from ssmtune.config import ConfigError
from ssmtune.methods import apply_method
from ssmtune.mixers import find_mixers
from ssmtune.mixers.selective_mixer import SelectiveMixer
from ssmtune.models import empty_model, load_model, portable_name, resolve_model
from ssmtune.stored_adapters import load_adapter, load_trained
from ssmtune.weights import save_weights


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def test_load_model_is_patched_in_float32_and_in_evaluation_mode(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint)
    assert not model.training and tokenizer.pad_token_id is not None
    assert all(isinstance(mixer, SelectiveMixer) for _, mixer in find_mixers(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    halved, _ = load_model(tiny_checkpoint, "bfloat16")
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Mamba2"])
def test_weights_are_those_of_the_file(kind, copy):
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 300, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, head_dim=16, rescale_prenorm_residual=True)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(copy)
    stored, loaded = load_file(copy / "model.safetensors"), load_model(str(copy))[0]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items() if name in stored)
    loaded.save_pretrained(copy)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(copy / "model.safetensors").items())


def test_built_in_models_keep_their_weights_in_transformers_too():
    for name in models.builtin_models():
        config = json.loads((models.CHECKPOINTS / name / "config.json").read_text())
        assert not config.get("rescale_prenorm_residual"), f"{name}: every loading would change its weights"


def test_half_precision_files_are_loaded_as_float32(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint)
    model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(str(tmp_path))[0].parameters()} == {torch.float32}


def test_built_in_model_is_found_by_name_and_recorded_by_it(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    model, _ = load_model("model")
    assert portable_name(model.name_or_path) == "model"
    adapter = tmp_path / "adapter"
    save_weights(apply_method(model, "lora"), adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    assert model.peft_config["default"].base_model_name_or_path == str(copy)
    load_trained(str(adapter))


@pytest.mark.parametrize(
    "name, message",
    [
        ("mamba-5n", "unknown model 'mamba-5n'; did you mean 'mamba-5m'"),
        ("./nowhere", "unknown model './nowhere'"),
        ("a/b/c", "unknown model 'a/b/c'"),
    ],
)
def test_unknown_names_are_answered_without_the_network(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "builtin_models", lambda: ["mamba-5m"])
    with pytest.raises(ConfigError, match=message):
        resolve_model(name)


def test_directories_that_are_no_model_are_explained(copy, tmp_path):
    with pytest.raises(ConfigError, match="it has no config.json"):
        load_model(str(tmp_path))
    weights = copy / "model.safetensors"
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only pytorch_model.bin, a pickle"):
        load_model(str(copy))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        load_model(str(tmp_path / "file"))


def test_empty_model_is_the_model_without_its_weights(tiny_checkpoint, copy):
    empty = empty_model(tiny_checkpoint)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    whole, _ = load_model(tiny_checkpoint)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded from"):
        empty_model(str(copy))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_explained(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be loaded from") as caught:
        load_model(str(copy))
    assert len(str(caught.value).splitlines()) <= 4


def test_remote_code_is_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Own: ...\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(copy))
    assert not (copy / "ran").exists()


def test_incomplete_adapter_is_refused(tiny_checkpoint, tmp_path):
    save_weights(apply_method(load_model(tiny_checkpoint)[0], "lora", {"layers": [0]}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": None}))
    with pytest.raises(ValueError, match="lacks 6 tensors, first base_model.model.backbone.layers.1"):
        load_trained(str(tmp_path))


def test_adapter_of_another_size_is_refused(tiny_checkpoint, tiny_mamba, tmp_path):
    save_weights(apply_method(load_model(tiny_checkpoint)[0], "lora", {"target_modules": ["in_proj"]}), tmp_path)
    other = tiny_mamba
    for layer in other.backbone.layers:
        layer.mixer.in_proj = torch.nn.Linear(32, 96)
    with pytest.raises(ValueError, match="the LORA adapter in .* does not fit MambaForCausalLM"):
        load_adapter(other, tmp_path)

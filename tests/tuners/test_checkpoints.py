"""Storing and loading adapters, and what a wrong or damaged file is answered with."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from ssmtune.tuners import StateOffsetConfig


def adapter_tensors(model):
    return {n: p.detach() for n, p in model.named_parameters() if "_adapter." in n}


def load_tensors(folder):
    return dict(sorted(load_file(folder / "adapter_model.safetensors").items()))


def assert_same_adapter(expected, actual):
    assert list(expected) == list(actual)
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def base(tiny_mamba, tmp_path):
    """The folder of a stored base model."""
    tiny_mamba.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def stored(base, make_config, make_nonzero, tmp_path):
    """A model with a non-zero adapter, and the folder the adapter is stored in."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = make_nonzero(get_peft_model(model, make_config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval().requires_grad_(False), tmp_path / "adapter"


@pytest.fixture
def offset_folder(base, make_nonzero, tmp_path):
    """The folder of a state-offset adapter, whose files a test may damage."""
    model = make_nonzero(get_peft_model(AutoModelForCausalLM.from_pretrained(base), StateOffsetConfig()))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip_is_exact(stored, base, low_cpu_mem_usage, input_ids, logits):
    model, folder = stored
    assert all(key.count(".mixer.") == 1 for key in load_tensors(folder))
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(loaded, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_adapter(adapter_tensors(model), adapter_tensors(loaded))
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_stays_float32_on_a_bfloat16_base(stored, base, low_cpu_mem_usage):
    model, folder = stored
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    arguments = dict(low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False)
    assert_same_adapter(adapter_tensors(model), adapter_tensors(PeftModel.from_pretrained(loaded, folder, **arguments)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_stored_in_bfloat16_loads_as_float32(offset_folder, base, low_cpu_mem_usage):
    file = offset_folder / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(
        loaded, offset_folder, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
    )
    assert {p.dtype for p in adapter_tensors(loaded).values()} == {torch.float32}


def test_auto_classes(stored, input_ids, logits):
    model, folder = stored
    expected = logits(model, input_ids)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder), input_ids), expected)
    # transformers' own loader gives a model without the PeftModel around it
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded, input_ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_adapter_of_transformers(stored, base, dtype, input_ids, logits):
    model, folder = stored
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    loaded.load_adapter(folder, "poet")
    actual = {f"base_model.model.{n.replace('.poet', '.default')}": p for n, p in adapter_tensors(loaded).items()}
    assert_same_adapter(adapter_tensors(model), actual)
    if dtype == torch.float32:
        assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    loaded.delete_adapter("poet")
    assert adapter_tensors(loaded) == {}


def test_add_adapter_of_transformers(tiny_mamba, make_config, make_nonzero, tmp_path, input_ids, logits):
    base = logits(tiny_mamba, input_ids)
    tiny_mamba.add_adapter(make_config(), "poet")
    make_nonzero(tiny_mamba)
    assert tiny_mamba.active_adapters() == ["poet"]
    assert (logits(tiny_mamba, input_ids) - base).abs().max() > 1e-3
    tiny_mamba.save_pretrained(tmp_path)
    stored = {key.removeprefix("base_model.model."): tensor for key, tensor in load_tensors(tmp_path).items()}
    assert_same_adapter({n.removesuffix(".poet"): p for n, p in sorted(adapter_tensors(tiny_mamba).items())}, stored)
    tiny_mamba.disable_adapters()
    torch.testing.assert_close(logits(tiny_mamba, input_ids), base)


def test_modules_to_save(base, make_config, make_nonzero, tmp_path, input_ids, logits):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), make_config(modules_to_save=["norm_f"]))
    model = make_nonzero(model)
    model.save_pretrained(tmp_path / "adapter")
    model.eval().requires_grad_(False)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


@pytest.fixture(params=["peft", "transformers", "state-dict"])
def load_error(request):
    """The message with which an adapter is refused, by each of the ways to load one; the model is then as before."""

    def error(folder, **sizes):
        config = dict(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2) | sizes
        model = MambaForCausalLM(MambaConfig(**config))
        keys, kinds = [*model.state_dict()], [type(m) for m in model.modules()]
        with pytest.raises(ValueError) as error:
            if request.param == "peft":
                PeftModel.from_pretrained(model, folder)
            elif request.param == "transformers":
                model.load_adapter(folder)
            else:
                tensors, stored = load_file(folder / "adapter_model.safetensors"), PeftConfig.from_pretrained(folder)
                model.load_adapter(peft_config=stored, adapter_state_dict=tensors, ignore_mismatched_sizes=True)
        assert str(error.value).count("\n") <= 3
        if request.param != "peft":
            assert [*model.state_dict()] == keys and [type(m) for m in model.modules()] == kinds
            assert not hasattr(model, "peft_config") and not model._hf_peft_config_loaded
        return str(error.value)

    return error


@pytest.mark.parametrize(
    "sizes, first_line",
    [
        (
            {"state_size": 16},
            "state_offset_h of backbone.layers.0.mixer has shape (64, 8) in the adapter file, "
            "this model needs (64, 16).",
        ),
        (
            {"hidden_size": 48},
            "state_offset_h of backbone.layers.0.mixer has shape (64, 8) in the adapter file, "
            "this model needs (96, 8).",
        ),
        (
            {"num_hidden_layers": 3},
            "the adapter file lacks 1 of 3 tensors, first state_offset_h of backbone.layers.2.mixer.",
        ),
        (
            {"num_hidden_layers": 1},
            "the adapter file has 1 tensors that this model has no place for, first backbone.layers.1.mixer"
            ".offset_adapter.state_offset_h.",
        ),
    ],
    ids=["state-size", "hidden-size", "more-layers", "fewer-layers"],
)
def test_adapter_of_another_model_is_an_error(offset_folder, base, load_error, sizes, first_line):
    message = load_error(offset_folder, **sizes)
    assert message.splitlines()[0] == first_line
    assert f"Load it on the model it was trained for: {str(base)!r}." in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(offset_folder, load_error, value):
    file = offset_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.backbone.layers.1.mixer.offset_adapter.state_offset_h"][3, :2] = value
    save_file(tensors, file)
    message = load_error(offset_folder)
    assert message.startswith(
        "state_offset_h of backbone.layers.1.mixer holds 2 values in the adapter file that are NaN"
    )


@pytest.mark.parametrize("size", [0, 5, 300, -1])
@pytest.mark.parametrize("load_error", ["peft", "transformers"], indirect=True)
def test_cut_off_file_is_a_short_error(offset_folder, load_error, size):
    file = offset_folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = load_error(offset_folder)
    assert message.startswith(f"cannot read {file} ({file.stat().st_size} bytes)")
    assert "Copy or save the adapter again." in message


def test_base_on_the_meta_device(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba.to("meta"), make_config())
    assert all(tensor.is_meta for tensor in adapter_tensors(model).values())


def test_low_cpu_mem_usage_without_weights(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba, make_config(), low_cpu_mem_usage=True)
    assert all(tensor.is_meta for tensor in adapter_tensors(model).values())
    assert not model.get_base_model().lm_head.weight.is_meta


def test_a_refused_adapter_leaves_the_others_alone(offset_folder, base, make_nonzero, input_ids, logits):
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(offset_folder, "first")
    expected = logits(loaded, input_ids)
    file = offset_folder / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        loaded.load_adapter(offset_folder, "second")
    assert list(loaded.peft_config) == ["first"]
    loaded.set_adapter("first")
    assert torch.equal(logits(loaded, input_ids), expected)


def test_auto_model_refuses_too(offset_folder):
    file = offset_folder / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(offset_folder)


def test_other_methods_load_as_ever(tiny_mamba, tmp_path):
    model = get_peft_model(tiny_mamba, LoraConfig(target_modules=["in_proj"], r=2))
    with torch.no_grad():
        model.get_submodule("base_model.model.backbone.layers.0.mixer.in_proj.lora_A.default").weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    loaded = model.unload()
    info = loaded.load_adapter(tmp_path)
    assert not info.missing_keys and list(loaded.peft_config) == ["default"]
    with pytest.raises(ValueError, match="already exists"):
        loaded.load_adapter(tmp_path)

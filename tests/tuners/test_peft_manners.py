"""What peft asks of every adapter method in its own shared tests, asked of every variant of ours."""

import copy
import json
import pickle

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import ssmtune

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def fresh(tiny_mamba, tmp_path):
    """A function that gives the base model anew, as if from where it is stored."""
    tiny_mamba.save_pretrained(tmp_path / "base")
    tiny_mamba.name_or_path = str(tmp_path / "base")
    return lambda dtype=torch.float32: copy.deepcopy(tiny_mamba).to(dtype)


@pytest.fixture
def adapted(fresh, make_config, make_nonzero):
    """A model with an adapter that changes what it predicts."""
    return make_nonzero(get_peft_model(fresh(), make_config(task_type="CAUSAL_LM"))).eval()


def named(model, adapter_name):
    return {name: p for name, p in model.named_parameters() if name.endswith(f".{adapter_name}")}


def fill(model, adapter_name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in named(model, adapter_name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def add(model, adapter_name, config, seed):
    model.add_adapter(adapter_name, config)
    fill(model, adapter_name, seed)


def test_attributes(adapted):
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "get_nb_trainable_parameters"):
        assert hasattr(adapted, name)
    assert isinstance(adapted, PeftModelForCausalLM) and adapted.peft_type == adapted.active_peft_config.peft_type


def test_adapter_name(fresh, make_config):
    model = get_peft_model(fresh(), make_config(), adapter_name="test-adapter")
    assert list(model.peft_config) == ["test-adapter"] and model.active_adapters == ["test-adapter"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(named(model, "test-adapter")) != set()


def test_prepare_for_training(adapted, input_ids):
    embed = adapted.get_input_embeddings()
    assert not embed(input_ids).requires_grad
    adapted.prepare_model_for_gradient_checkpointing(adapted)
    adapted.enable_input_require_grads()
    assert embed(input_ids).requires_grad


def test_save_pretrained(adapted, fresh, tmp_path, input_ids, logits):
    adapted.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", WEIGHTS, "README.md"}
    state, stored = get_peft_model_state_dict(adapted), load_file(tmp_path / "adapter" / WEIGHTS)
    assert state.keys() == stored.keys() and all(torch.equal(state[key], stored[key]) for key in state)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert {key: value.shape for key, value in get_peft_model_state_dict(loaded).items()} == {
        key: value.shape for key, value in state.items()
    }
    assert torch.equal(logits(loaded, input_ids), logits(adapted, input_ids))


def test_save_pretrained_pickle(adapted, fresh, tmp_path, input_ids, logits):
    adapted.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file() and not (tmp_path / "adapter" / WEIGHTS).exists()
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, input_ids), logits(adapted, input_ids))


def test_save_pretrained_selected_adapters(adapted, make_config, fresh, tmp_path):
    add(adapted, "new", make_config(), 2)
    adapted.save_pretrained(tmp_path / "adapter", selected_adapters=["new"])
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    stored = load_file(tmp_path / "adapter" / "new" / WEIGHTS)
    expected = get_peft_model_state_dict(adapted, adapter_name="new")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    with pytest.raises(ValueError, match="selected_adapters"):
        adapted.save_pretrained(tmp_path / "adapter", selected_adapters=["none"])


def test_load_into_a_wrapped_model(adapted, fresh, make_config, tmp_path, input_ids, logits):
    adapted.save_pretrained(tmp_path / "adapter")
    model = get_peft_model(fresh(), make_config(task_type="CAUSAL_LM"))
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(adapted))
    assert not result.unexpected_keys and not any(".default" in key for key in result.missing_keys)
    assert torch.equal(logits(model.eval(), input_ids), logits(adapted, input_ids))


def test_from_pretrained_config_construction(adapted, fresh, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    given = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(given) is type(adapted.active_peft_config)
    own = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert own.peft_config["default"] == given and own.peft_config["default"] is not given
    assert PeftModel.from_pretrained(fresh(), tmp_path / "adapter", config=given).peft_config["default"] is given


def test_config_round_trip(adapted, tmp_path):
    config = adapted.active_peft_config
    adapted.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["peft_type"] == config.peft_type.value and stored["inference_mode"] is True
    assert stored["base_model_name_or_path"] == str(tmp_path / "base") and config.inference_mode is False
    loaded = PeftConfig.from_pretrained(tmp_path / "adapter")
    loaded.inference_mode = False
    assert loaded == config and pickle.loads(pickle.dumps(config)) == config and copy.deepcopy(config) == config


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_multiple_adapters(adapted, fresh, make_config, tmp_path, input_ids, logits, low_cpu_mem_usage):
    add(adapted, "other", make_config(), 2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    result = loaded.load_adapter(tmp_path / "adapter" / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not result.missing_keys
    assert not any(p.is_meta for p in loaded.parameters())
    for name in ("default", "other"):
        loaded.set_adapter(name)
        adapted.set_adapter(name)
        assert torch.equal(logits(loaded, input_ids), logits(adapted, input_ids))
    loaded.load_adapter(tmp_path / "adapter" / "other", "third", is_trainable=True)
    assert named(loaded, "third") and all(p.requires_grad for p in named(loaded, "third").values())


def test_inject_in_a_model_with_low_cpu_mem_usage(adapted, fresh, make_config, input_ids, logits):
    model = inject_adapter_in_model(make_config(), fresh(), low_cpu_mem_usage=True)
    assert named(model, "default") and all(p.is_meta for p in named(model, "default").values())
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(adapted), low_cpu_mem_usage=True)
    assert not result.unexpected_keys and not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model.eval(), input_ids), logits(adapted, input_ids))


def test_inject_where_a_state_dict_says(adapted, fresh, make_config):
    state = {
        k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(adapted).items() if ".1." in k
    }
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        model = inject_adapter_in_model(make_config(), fresh(), state_dict=state)
    assert {name.removesuffix(".default") for name in named(model, "default")} == set(state)


def test_merge_raises(adapted, input_ids, logits):
    expected = logits(adapted, input_ids)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, adapted.base_model.merge_and_unload):
        for options in ({}, {"safe_merge": True}, {"adapter_names": ["default"]}):
            with pytest.raises(NotImplementedError, match="cannot merge"):
                merge(**options)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, input_ids), expected)


def test_generate(adapted, input_ids):
    mask = torch.ones_like(input_ids)
    options = dict(max_new_tokens=3, do_sample=False)
    expected = adapted.generate(input_ids=input_ids, attention_mask=mask, **options)
    assert torch.equal(adapted.generate(input_ids, **options), expected)
    assert torch.equal(adapted.base_model.generate(input_ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_half_precision(fresh, make_config, make_nonzero, dtype, input_ids):
    model = make_nonzero(get_peft_model(fresh(dtype=dtype), make_config(task_type="CAUSAL_LM"))).eval()
    mask = torch.ones_like(input_ids)
    generated = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
    assert generated.shape == (2, 12)


def test_training(adapted, input_ids):
    adapted.train()
    adapted(input_ids=input_ids).logits.sum().backward()
    for name, parameter in adapted.named_parameters():
        if adapted.base_model.prefix in name:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_training_with_inputs_embeds(adapted, input_ids):
    embeds = adapted.get_input_embeddings()(input_ids)
    adapted(inputs_embeds=embeds).logits.sum().backward()
    assert all(p.grad.any() for p in named(adapted, "default").values())


def test_inference_safetensors(adapted, fresh, tmp_path, input_ids, logits):
    adapted.train()
    adapted(input_ids=input_ids).logits.sum().backward()
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert not loaded.training and torch.equal(logits(loaded, input_ids), logits(adapted.eval(), input_ids))


@pytest.mark.parametrize("layers", [0, [0], [0, 1]], ids=str)
def test_training_layer_indexing(fresh, make_config, make_nonzero, layers, tmp_path, input_ids, logits):
    model = make_nonzero(get_peft_model(fresh(), make_config(layers_to_transform=layers, task_type="CAUSAL_LM")))
    model(input_ids=input_ids).logits.sum().backward()
    adapters = named(model, "default")
    assert {int(name.split(".layers.")[1][0]) for name in adapters} == set(layers if isinstance(layers, list) else [0])
    assert all(p.grad.any() for p in adapters.values())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, input_ids), logits(model.eval(), input_ids))
    whole = get_peft_model(fresh(), make_config())
    assert model.get_nb_trainable_parameters()[0] * 2 == whole.get_nb_trainable_parameters()[0] * len(
        layers if isinstance(layers, list) else [0]
    )


def test_training_gradient_checkpointing(adapted, input_ids):
    adapted.train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    assert adapted.is_gradient_checkpointing
    adapted(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(p.grad.any() for p in named(adapted, "default").values())


def test_device_map(adapted, fresh, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", device_map={"": "cpu"}, torch_device="cpu")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("by", ["model", "tuner"])
def test_delete_active_adapter(adapted, make_config, input_ids, logits, by):
    add(adapted, "delete-me", make_config(), 2)
    expected = logits(adapted, input_ids)
    adapted.set_adapter("delete-me")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        (adapted if by == "model" else adapted.base_model).delete_adapter("delete-me")
    assert list(adapted.peft_config) == ["default"] and not named(adapted, "delete-me")
    assert adapted.base_model.active_adapters == ["default"]
    assert torch.equal(logits(adapted.base_model, input_ids), expected)
    (adapted if by == "model" else adapted.base_model).delete_adapter("default")
    assert adapted.base_model.active_adapters == [] and not named(adapted, "default")


@pytest.mark.parametrize("by", ["model", "tuner"])
def test_delete_inactive_adapter(adapted, make_config, input_ids, logits, by):
    add(adapted, "delete-me", make_config(), 2)
    expected = logits(adapted, input_ids)
    (adapted if by == "model" else adapted.base_model).delete_adapter("delete-me")
    assert list(adapted.peft_config) == ["default"] and not named(adapted, "delete-me")
    assert adapted.active_adapters == ["default"] and torch.equal(logits(adapted, input_ids), expected)
    layers = [m for m in adapted.modules() if isinstance(m, ssmtune.mixers.StateAdapter)]
    assert all(layer.available_adapters == {"default"} for layer in layers)
    assert not any("delete-me" in getattr(layer, name) for layer in layers for name in layer.other_param_names)


def test_delete_one_of_two_active_adapters(adapted, make_config, input_ids, logits):
    expected = logits(adapted, input_ids)
    add(adapted, "other", make_config(), 2)
    adapted.base_model.set_adapter(["default", "other"])
    assert (logits(adapted, input_ids) - expected).abs().max() > 1e-3
    adapted.delete_adapter("other")
    assert torch.equal(logits(adapted, input_ids), expected)


def test_delete_unknown_adapter_raises(adapted):
    with pytest.raises(ValueError, match="unknown-adapter does not exist"):
        adapted.delete_adapter("unknown-adapter")


def test_a_name_can_be_used_again_after_deletion(adapted, make_config, input_ids, logits):
    expected = logits(adapted, input_ids)
    add(adapted, "other", make_config(), 2)
    adapted.delete_adapter("other")
    add(adapted, "other", make_config(), 3)
    assert torch.equal(logits(adapted, input_ids), expected)


def test_unload_adapter(adapted, fresh, input_ids, logits):
    expected, with_adapter = logits(fresh(), input_ids), logits(adapted, input_ids)
    unloaded = adapted.unload()
    assert (logits(unloaded, input_ids) - with_adapter).abs().max() > 1e-3
    assert torch.equal(logits(unloaded, input_ids), expected)


def test_disable_adapter(adapted, fresh, input_ids, logits):
    base = fresh()
    ssmtune.patch(base)
    expected, with_adapter = logits(base, input_ids), logits(adapted, input_ids)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, input_ids), expected)
        assert not any(p.requires_grad for p in adapted.parameters())
        generated = adapted.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, base.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False))
    assert torch.equal(logits(adapted, input_ids), with_adapter)
    assert all(p.requires_grad for p in named(adapted, "default").values())
    adapted.base_model.disable_adapter_layers()
    assert torch.equal(logits(adapted, input_ids), expected)
    adapted.base_model.enable_adapter_layers()
    assert torch.equal(logits(adapted, input_ids), with_adapter)


def test_passing_input_embeds(adapted, input_ids, logits):
    embeds = adapted.get_input_embeddings()(input_ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs_embeds=embeds).logits, logits(adapted, input_ids))
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = adapted.generate(input_ids=input_ids, **options)[:, input_ids.shape[1] :]
    assert torch.equal(adapted.generate(inputs_embeds=embeds, **options), expected)


def test_weighted_combination_of_adapters(fresh, make_state_config, make_nonzero, input_ids, logits):
    adapted = make_nonzero(get_peft_model(fresh(), make_state_config(task_type="CAUSAL_LM"))).eval()
    one = logits(adapted, input_ids)
    add(adapted, "other", make_state_config(), 2)
    for name, weights in {"same": [1.0, 0.0], "mean": [0.5, 0.5], "difference": [1.0, -1.0]}.items():
        adapted.add_weighted_adapter(["default", "other"], weights, name)
        adapted.set_adapter(name)
        result = logits(adapted, input_ids)
        assert torch.isfinite(result).all()
        if name == "same":
            torch.testing.assert_close(result, one)
    adapted.delete_adapter("other")
    assert torch.equal(logits(adapted, input_ids), result)


def test_set_requires_grad(adapted, make_config):
    add(adapted, "other", make_config(), 2)
    assert not any(p.requires_grad for p in named(adapted, "other").values())
    adapted.set_requires_grad(["default", "other"])
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        *named(adapted, "default"),
        *named(adapted, "other"),
    }
    adapted.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in named(adapted, "default").values())
    adapted.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in adapted.parameters())


def test_modules_to_save_belong_to_their_adapter(fresh, make_config, tmp_path, input_ids, logits):
    model = get_peft_model(fresh(), make_config(modules_to_save=["norm_f"]), adapter_name="one").eval()
    model.add_adapter("two", make_config(modules_to_save=["norm_f"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.two" in name:
                parameter.add_(1)
    fill(model, "one", 1)
    fill(model, "two", 2)
    model.save_pretrained(tmp_path / "adapter")
    for name in ("one", "two"):
        model.set_adapter(name)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            *named(model, name),
            f"base_model.model.backbone.norm_f.modules_to_save.{name}.weight",
        }
        loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter" / name)
        assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    base = fresh()
    ssmtune.patch(base)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), logits(base, input_ids))


def test_model_status(adapted, make_config):
    add(adapted, "other", make_config(), 2)
    status = adapted.get_model_status()
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 2)
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == adapted.get_nb_trainable_parameters()[0] > 0


def test_methods_of_transformers(fresh, make_config, tmp_path, input_ids, logits):
    model = fresh()
    model.add_adapter(make_config(), "one")
    model.add_adapter(make_config(), "two")
    assert model.active_adapters() == ["two"]
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        fill(model, name, seed)
    for names in ("one", "two", ["one", "two"]):
        model.set_adapter(names)
        outputs[str(names)] = logits(model, input_ids)
    assert all((outputs["['one', 'two']"] - outputs[name]).abs().max() > 1e-3 for name in ("one", "two"))
    base = fresh()
    ssmtune.patch(base)
    model.disable_adapters()
    assert torch.equal(logits(model, input_ids), logits(base, input_ids))
    model.enable_adapters()
    assert torch.equal(logits(model, input_ids), outputs["['one', 'two']"])
    model.set_adapter("two")
    model.save_pretrained(tmp_path / "native")
    state = model.get_adapter_state_dict("two")
    assert {f"base_model.model.{key}" for key in state} == set(load_file(tmp_path / "native" / WEIGHTS))
    for low_cpu_mem_usage in (False, True):
        loaded = fresh()
        loaded.load_adapter(tmp_path / "native", "mine", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, input_ids), outputs["two"])
    loaded.load_adapter(peft_config=make_config(), adapter_state_dict=state, adapter_name="again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, input_ids), outputs["two"])
    assert named(loaded, "again") and all(p.requires_grad for p in named(loaded, "again").values())
    model.delete_adapter("two")
    model.set_adapter("one")
    assert not named(model, "two") and torch.equal(logits(model, input_ids), outputs["one"])

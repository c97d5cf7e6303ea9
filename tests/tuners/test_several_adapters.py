"""Several adapters of one method, and methods beside each other."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import ssmtune
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig, StateOffsetLayer

LORA = {"target_modules": ["in_proj", "x_proj"], "r": 2, "task_type": "CAUSAL_LM"}
METHODS = {
    "offset": lambda: StateOffsetConfig(task_type="CAUSAL_LM"),
    "initial": lambda: InitialStateConfig(task_type="CAUSAL_LM"),
    "low": lambda: LoraConfig(**LORA),
}
PAIRS = [("offset", "low"), ("low", "offset"), ("initial", "low"), ("low", "initial"), ("offset", "initial")]

LAYERS = {"StateOffsetLayer", "InitialStateLayer", "AdditionalScanLayer"}


def fill(model, adapter_name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter_name}" in name:
                # a large LoRA makes steps so long that an initial state is forgotten in one
                std = 0.2 if ".lora_" in name else 1.0
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def two_adapters(tiny_mamba, make_config):
    return two_of(tiny_mamba, make_config)


def two_of(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba, make_config(), adapter_name="first")
    model.add_adapter("second", make_config())
    fill(model, "first", 1)
    fill(model, "second", 2)
    return model


def test_a_new_adapter_is_inactive(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config()))
    expected = logits(model, input_ids)
    model.add_adapter("second", make_config())
    fill(model, "second", 2)
    assert torch.equal(logits(model, input_ids), expected)
    assert all(".default" in name for name, p in model.named_parameters() if p.requires_grad)


def test_set_adapter_switches(two_adapters, input_ids, logits):
    first = logits(two_adapters, input_ids)
    two_adapters.set_adapter("second")
    second = logits(two_adapters, input_ids)
    assert (first - second).abs().max() > 1e-3
    assert all(".second" in name for name, p in two_adapters.named_parameters() if p.requires_grad)
    two_adapters.set_adapter("first")
    assert torch.equal(logits(two_adapters, input_ids), first)


def test_active_adapters_are_summed(tiny_mamba, make_state_config, input_ids, logits):
    two_adapters = two_of(tiny_mamba, make_state_config)
    layers = [m for m in two_adapters.modules() if isinstance(m, ssmtune.mixers.StateAdapter)]

    def handed_over(layer):
        return {name: value for name, value in vars(layer.state_inputs()).items() if value is not None}

    apart = []
    for name in ("first", "second"):
        two_adapters.set_adapter(name)
        apart.append([handed_over(layer) for layer in layers])
    two_adapters.base_model.set_adapter(["first", "second"])
    for one, other, both in zip(*apart, map(handed_over, layers), strict=True):
        assert one.keys() == other.keys() == both.keys() and both
        for name, value in both.items():
            torch.testing.assert_close(value, one[name] + other[name])
    assert all(p.requires_grad for m in layers for p in m.parameters())
    assert torch.isfinite(logits(two_adapters, input_ids)).all()


def test_delete_adapter(two_adapters, input_ids, logits):
    two_adapters.set_adapter("second")
    second = logits(two_adapters, input_ids)
    two_adapters.delete_adapter("first")
    assert not any(".first" in name for name, _ in two_adapters.named_parameters())
    assert torch.equal(logits(two_adapters, input_ids), second)
    base = two_adapters.get_base_model()
    two_adapters.delete_adapter("second")
    assert not any("_adapter." in name for name, _ in base.named_parameters())
    assert (logits(base, input_ids) - second).abs().max() > 1e-3


def test_status(two_adapters):
    status = two_adapters.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters, status.merged_adapters) == (2, ["first"], [])
    assert status.available_adapters == ["first", "second"]
    assert {layer.module_type for layer in two_adapters.get_layer_status()} <= LAYERS


def test_adapters_are_stored_apart(two_adapters, tiny_mamba, make_config, tmp_path, input_ids, logits):
    two_adapters.save_pretrained(tmp_path)
    two_adapters.set_adapter("second")
    two_adapters.requires_grad_(False)
    expected = logits(two_adapters, input_ids)
    loaded = PeftModel.from_pretrained(two_adapters.unload(), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", "other")
    loaded.set_adapter("other")
    loaded.requires_grad_(False)
    assert torch.equal(logits(loaded, input_ids), expected)


def test_low_rank_beside_dense(tiny_mamba, make_nonzero):
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig()))
    for name, config in {"low": StateOffsetConfig(rank=2), "y": StateOffsetConfig(target="y")}.items():
        model.add_adapter(name, config)
        fill(model, name, 3)
    layer = next(m for m in model.modules() if isinstance(m, StateOffsetLayer))
    model.base_model.set_adapter(["default", "low", "y"])
    inputs = layer.state_inputs()
    torch.testing.assert_close(inputs.state_offset, layer.value("h", "default") + layer.value("h", "low"))
    assert torch.equal(inputs.output_offset, layer.value("y", "y"))


@pytest.fixture(params=PAIRS, ids="-then-".join)
def stack(request, tiny_mamba):
    """Two methods on one model: the names in order, the two PeftModels, and the model both of them wrap."""
    models = []
    for name in request.param:
        models.append(get_peft_model(tiny_mamba, METHODS[name](), adapter_name=name))
    for seed, name in enumerate(request.param):
        fill(tiny_mamba, name, seed)
    return request.param, models, tiny_mamba


def test_methods_train_beside_each_other(stack, input_ids):
    names, models, base = stack
    models[1](input_ids=input_ids, labels=input_ids).loss.backward()
    trainable = {name: p for name, p in base.named_parameters() if p.requires_grad}
    for name in names:
        assert any(f".{name}" in parameter for parameter in trainable)
    for name, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(f".{names[0]}" in n or f".{names[1]}" in n for n in trainable)


def test_methods_generate_beside_each_other(stack, input_ids):
    _, models, _ = stack
    arguments = dict(input_ids=input_ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(*(models[1].generate(**arguments, use_cache=use_cache) for use_cache in (True, False)))


def test_methods_are_stored_apart(stack, tmp_path, input_ids, logits):
    names, models, base = stack
    expected = logits(base, input_ids)
    models[1].save_pretrained(tmp_path)
    for model in reversed(models):
        model.unload()
    assert not any(isinstance(m, (LoraLayer, ssmtune.mixers.StateAdapter)) for m in base.modules())
    for name in reversed(names):
        PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
    torch.testing.assert_close(logits(base, input_ids), expected)


@pytest.mark.parametrize("unload", [False, True], ids=["merge", "merge-and-unload"])
@pytest.mark.parametrize("pair", PAIRS[:4], ids="-then-".join)
def test_lora_merges_under_a_state_adapter(pair, unload, tiny_mamba, tmp_path, input_ids, logits):
    models = {name: get_peft_model(tiny_mamba, METHODS[name](), adapter_name=name) for name in pair}
    for seed, name in enumerate(pair):
        fill(tiny_mamba, name, seed)
    expected = logits(tiny_mamba, input_ids)
    lora = models.pop("low")
    (name, state), exact = models.popitem(), {"rtol": 1e-4, "atol": 1e-4}
    lora.merge_adapter()
    torch.testing.assert_close(logits(tiny_mamba, input_ids), expected, **exact)
    lora.unmerge_adapter()
    if not unload:
        torch.testing.assert_close(logits(tiny_mamba, input_ids), expected, **exact)
        return
    lora.merge_and_unload()
    assert not any(isinstance(m, LoraLayer) for m in tiny_mamba.modules())
    torch.testing.assert_close(logits(state, input_ids), expected, **exact)
    # the state adapter is all there as before: switched off and on, stored, and taken out
    assert list(state.peft_config) == [name] and state.active_adapters == [name]
    state.save_pretrained(tmp_path / "adapters")
    assert [path.name for path in sorted((tmp_path / "adapters").iterdir())] == ["README.md", name]
    with state.disable_adapter():
        assert (logits(state, input_ids) - expected).abs().max() > 1e-3
    assert state.get_model_status().available_adapters == [name]
    merged = state.unload()
    assert type(merged.backbone.layers[0].mixer).__name__ == "MambaMixer" and not hasattr(merged, "peft_config")
    loaded = PeftModel.from_pretrained(merged, tmp_path / "adapters" / name)
    torch.testing.assert_close(logits(loaded, input_ids), expected, **exact)


@pytest.mark.parametrize("pair", PAIRS[:4], ids="-then-".join)
def test_unload_of_a_state_method_keeps_lora(pair, tiny_mamba, tmp_path, input_ids, logits):
    base, alone = copy.deepcopy(tiny_mamba), get_peft_model(copy.deepcopy(tiny_mamba), LoraConfig(**LORA), "low")
    models = {}
    for name in pair:
        config = METHODS[name]()
        config.modules_to_save = None if name == "low" else ["norm_f"]
        models[name] = get_peft_model(tiny_mamba, config, adapter_name=name)
    for model in (tiny_mamba, alone):
        fill(model, "low", 1)
    expected = logits(alone, input_ids)
    lora, (name, state) = models.pop("low"), models.popitem()
    fill(tiny_mamba, name, 2)
    state.unload()
    assert torch.allclose(logits(lora, input_ids), expected, atol=1e-6)
    assert list(lora.peft_config) == ["low"]
    lora.save_pretrained(tmp_path)
    with lora.disable_adapter():
        torch.testing.assert_close(logits(lora, input_ids), logits(base, input_ids))
    torch.testing.assert_close(logits(lora.merge_and_unload(), input_ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "low"), input_ids), expected, atol=1e-6)


def test_unload_of_one_state_method_keeps_the_other(tiny_mamba, input_ids, logits):
    offset = get_peft_model(tiny_mamba, StateOffsetConfig(), adapter_name="offset")
    initial = get_peft_model(tiny_mamba, InitialStateConfig(), adapter_name="initial")
    fill(tiny_mamba, "initial", 1)
    expected = logits(tiny_mamba, input_ids)
    fill(tiny_mamba, "offset", 2)
    offset.unload()
    assert torch.equal(logits(tiny_mamba, input_ids), expected)
    initial.unload()
    assert type(tiny_mamba.backbone.layers[0].mixer).__name__ == "MambaMixer"


def test_methods_of_transformers_beside_each_other(tiny_mamba, input_ids, logits):
    tiny_mamba.add_adapter(LoraConfig(**LORA), "low")
    tiny_mamba.add_adapter(StateOffsetConfig(), "offset")
    fill(tiny_mamba, "low", 1)
    fill(tiny_mamba, "offset", 2)
    outputs = []
    for names in (["low"], ["offset"], ["low", "offset"]):
        tiny_mamba.set_adapter(names)
        outputs.append(logits(tiny_mamba, input_ids))
    assert all((outputs[2] - output).abs().max() > 1e-3 for output in outputs[:2])


def test_one_name_for_two_methods_is_an_error(tiny_mamba):
    get_peft_model(tiny_mamba, LoraConfig(**LORA))
    with pytest.raises(
        ValueError, match=r"already has an adapter named 'default', of the method LORA(.|\n)*adapter_name"
    ):
        get_peft_model(tiny_mamba, StateOffsetConfig())


@pytest.mark.parametrize("name", ["half", "training", "a.b", ""])
def test_a_name_that_torch_cannot_store_is_an_error(tiny_mamba, make_config, name):
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        get_peft_model(tiny_mamba, make_config(), adapter_name=name)
    model = get_peft_model(tiny_mamba, make_config())
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        model.add_adapter(name, make_config())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("pair", PAIRS, ids="-then-".join)
def test_methods_train_are_stored_and_load_together(pair, tiny_mamba, tmp_path, input_ids, logits):
    base = copy.deepcopy(tiny_mamba)
    for name in pair:
        model = get_peft_model(tiny_mamba, METHODS[name](), adapter_name=name)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in parameters.items())
    model.save_pretrained(tmp_path)
    expected = logits(model.eval(), input_ids)
    loaded = ssmtune.load_adapters(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded, input_ids), expected)
    assert set(loaded.peft_config) == set(pair) and not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, input_ids), logits(base, input_ids))
    trainable = ssmtune.load_adapters(base, tmp_path, is_trainable=True)
    assert {name for name, p in trainable.get_base_model().named_parameters() if p.requires_grad} == {
        name.removeprefix("base_model.model.") for name in parameters
    }


def test_load_adapters_takes_the_first_of_each_method(tiny_mamba, tmp_path, input_ids, logits):
    base = copy.deepcopy(tiny_mamba)
    model = get_peft_model(tiny_mamba, StateOffsetConfig())
    model.add_adapter("later", StateOffsetConfig(rank=2))
    get_peft_model(tiny_mamba, LoraConfig(**LORA), adapter_name="low")
    for seed, name in enumerate(("default", "later", "low")):
        fill(tiny_mamba, name, seed)
    tiny_mamba.eval()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint-2")
    expected = logits(model, input_ids)
    loaded = ssmtune.load_adapters(base, tmp_path)
    assert list(loaded.peft_config) == ["default", "later", "low"]
    torch.testing.assert_close(logits(loaded, input_ids), expected)


def test_load_adapters_of_an_empty_folder_is_an_error(tiny_mamba, tmp_path):
    with pytest.raises(ValueError, match="holds no adapter"):
        ssmtune.load_adapters(tiny_mamba, tmp_path)


def test_a_refused_method_leaves_the_one_before_as_it_was(tiny_mamba, tmp_path):
    lora = get_peft_model(tiny_mamba, LoraConfig(**LORA), adapter_name="low")
    for config, name in ((StateOffsetConfig(target_modules=["mixr"]), "shift"), (StateOffsetConfig(), "half")):
        with pytest.raises(ValueError):
            get_peft_model(tiny_mamba, config, adapter_name=name)
    assert list(lora.peft_config) == ["low"]
    get_peft_model(tiny_mamba, StateOffsetConfig(), adapter_name="shift").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "low", "shift"]

"""What an adapter does to a model: both methods, every variant."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ssmtune
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig


def test_model_equals_its_base_at_first(tiny_mamba, make_config, input_ids, logits):
    from_transformers = logits(tiny_mamba, input_ids)
    ssmtune.patch(tiny_mamba)
    base = logits(tiny_mamba, input_ids)
    model = get_peft_model(tiny_mamba, make_config())
    assert torch.equal(logits(model, input_ids), base)
    torch.testing.assert_close(base, from_transformers)


def test_only_the_adapter_is_trainable(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba, make_config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if model.base_model.prefix in name}
    assert len({name.split(".mixer.")[0] for name in trainable}) == 2


def add_by_formula(mixer, config, tensors):
    """Add an adapter to transformers' own mixer by what its projections return: the scan is linear in all of them."""
    seen = {}

    def added(_, args):
        if isinstance(config, InitialStateConfig):
            delta = F.softplus(seen["dt"] @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
            decay = torch.exp(delta.cumsum(1)[..., None] * -torch.exp(mixer.A_log))
            y = torch.einsum("bln,bldn,dn->bld", seen["C"], decay, matrix)
        else:
            y = tensors["y"] if config.target == "y" else torch.einsum("bln,dn->bld", seen["C"], matrix)
        return args[0] + y * F.silu(seen["z"])

    if config.rank is not None:
        matrix = tensors["B"] @ tensors["A"] * (config.alpha / config.rank if config.alpha else 1)
    else:
        matrix = tensors.get("h")
    widths = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    mixer.in_proj.register_forward_hook(lambda _, __, out: seen.update(z=out.chunk(2, dim=-1)[1]))
    mixer.x_proj.register_forward_hook(
        lambda _, __, out: seen.update(dt=out.split(widths, -1)[0], C=out.split(widths, -1)[2])
    )
    mixer.out_proj.register_forward_pre_hook(added)


def test_effect_and_gradient_are_those_of_the_formula(
    tiny_mamba, make_scan_config, make_nonzero, input_ids, assert_close
):
    plain = copy.deepcopy(tiny_mamba).requires_grad_(False)
    model = make_nonzero(get_peft_model(tiny_mamba, make_scan_config()))
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter.items()}
    for index, layer in enumerate(plain.backbone.layers):
        kinds = {name: name.split(".")[-2].rpartition("_")[2] for name in leaves if f".layers.{index}." in name}
        add_by_formula(layer.mixer, model.active_peft_config, {kind: leaves[name] for name, kind in kinds.items()})
    expected, actual = plain(input_ids, labels=input_ids), model(input_ids=input_ids, labels=input_ids)
    assert_close("logits", expected.logits, actual.logits, 1e-5)
    expected.loss.backward()
    actual.loss.backward()
    for name, parameter in adapter.items():
        assert_close(name, leaves[name].grad, parameter.grad, 1e-5)


def test_disable_adapter_gives_the_base(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    ssmtune.patch(tiny_mamba)
    base = logits(tiny_mamba, input_ids)
    model = make_nonzero(get_peft_model(tiny_mamba, make_config()))
    adapted = logits(model, input_ids)
    assert (adapted - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), base)
    assert torch.equal(logits(model, input_ids), adapted)


def test_generation_with_a_cache_equals_without(tiny_mamba, make_config, make_nonzero, input_ids):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config(task_type="CAUSAL_LM")))
    arguments = dict(input_ids=input_ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    arguments |= dict(return_dict_in_generate=True, output_logits=True)
    cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    beams = [model.generate(**arguments, use_cache=use_cache, num_beams=3).sequences for use_cache in (True, False)]
    assert torch.equal(*beams)


def test_left_padding_changes_nothing(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config(task_type="CAUSAL_LM")))
    pads = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([pads, input_ids], dim=1)
    mask = torch.cat([pads, torch.ones_like(input_ids)], dim=1)
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 4:], logits(model, input_ids))
    arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    generated = model.generate(input_ids=padded, attention_mask=mask, **arguments)
    assert torch.equal(generated[:, 4:], model.generate(input_ids=input_ids, **arguments))


def test_unload_restores_the_model(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    base, kinds, keys = (
        logits(tiny_mamba, input_ids),
        [type(m) for m in tiny_mamba.modules()],
        [*tiny_mamba.state_dict()],
    )
    model = make_nonzero(get_peft_model(tiny_mamba, make_config())).unload()
    assert model is tiny_mamba
    assert [type(m) for m in model.modules()] == kinds and [*model.state_dict()] == keys
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, input_ids), base)


def test_unload_leaves_a_patched_model_patched(tiny_mamba):
    ssmtune.patch(tiny_mamba)
    kinds = [type(m) for m in tiny_mamba.modules()]
    model = get_peft_model(tiny_mamba, StateOffsetConfig()).unload()
    assert [type(m) for m in model.modules()] == kinds


def test_merging_is_refused(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config()))
    adapted = logits(model, input_ids)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot merge its adapter(.|\n)*unload\(\)"):
            merge()
    assert torch.equal(logits(model, input_ids), adapted)


def test_initial_state_says_that_a_cache_can_carry_it(tiny_mamba):
    with pytest.raises(NotImplementedError, match="starting cache"):
        get_peft_model(tiny_mamba, InitialStateConfig()).merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_stays_float32_in_a_half_model(tiny_mamba, make_config, dtype, autocast_adapter_dtype, input_ids):
    model = get_peft_model(tiny_mamba.to(dtype), make_config(), autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = [p for p in model.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in adapter]
    model.half().to(dtype)
    assert model.get_base_model().backbone.layers[0].mixer.in_proj.weight.dtype == dtype
    assert all(p.dtype == torch.float32 for p in adapter)
    assert all(torch.equal(p, value) for p, value in zip(adapter, values, strict=True))
    if dtype == torch.bfloat16:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in adapter)


def test_low_rank_product_is_not_rounded_by_autocast(tiny_mamba, make_nonzero):
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(rank=2)))
    layer = model.get_submodule("base_model.model.backbone.layers.0.mixer.offset_adapter")
    expected = layer.state_inputs().state_offset
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.state_inputs().state_offset, expected)


def test_alpha_scales_the_product(tiny_mamba, make_nonzero):
    offsets = []
    for alpha in (None, 8):
        model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(rank=2, alpha=alpha)))
        layer = model.get_submodule("base_model.model.backbone.layers.0.mixer.offset_adapter")
        offsets.append(layer.value("h", "default"))
        tiny_mamba = model.unload()
    torch.testing.assert_close(offsets[1], 4 * offsets[0])


def test_init_weights_false_starts_with_noise(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba, make_config(init_weights=False))
    assert all(p.any() for p in model.parameters() if p.requires_grad)


def test_deepcopy_and_pickle(tiny_mamba, make_config, make_nonzero, input_ids, logits):
    model = make_nonzero(get_peft_model(tiny_mamba, make_config()))
    expected = logits(model, input_ids)
    assert torch.equal(logits(copy.deepcopy(model), input_ids), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), input_ids), expected)


def test_compiles_without_graph_breaks(tiny_mamba, make_nonzero, input_ids):
    get_peft_model(tiny_mamba, InitialStateConfig(rank=2), adapter_name="initial")
    model = make_nonzero(get_peft_model(tiny_mamba, StateOffsetConfig(), adapter_name="offset"))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        output = run(input_ids=input_ids, labels=input_ids)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)


def test_a_name_used_again_starts_afresh(tiny_mamba, make_nonzero):
    for config in (StateOffsetConfig(), StateOffsetConfig(rank=2), StateOffsetConfig(target="y")):
        model = make_nonzero(get_peft_model(tiny_mamba, config))
    layer = tiny_mamba.backbone.layers[0].mixer.offset_adapter
    assert [name for name, _ in layer.named_parameters()] == ["state_offset_y.default"] and not layer.scaling
    assert model.get_nb_trainable_parameters()[0] == 2 * 64


def test_layers_to_transform(tiny_mamba, make_config):
    model = get_peft_model(tiny_mamba, make_config(layers_to_transform=[1], layers_pattern="layers"))
    assert all(".layers.1." in name for name, p in model.named_parameters() if p.requires_grad)
    assert type(tiny_mamba.backbone.layers[0].mixer).__name__ == "MambaMixer"


def test_exclude_modules(tiny_mamba):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(exclude_modules=["layers.1.mixer"]))
    assert all(".layers.0." in name for name, p in model.named_parameters() if p.requires_grad)


def test_target_modules_as_an_expression(tiny_mamba):
    model = get_peft_model(tiny_mamba, StateOffsetConfig(target_modules=r"backbone\.layers\.0\.mixer"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.backbone.layers.0.mixer.offset_adapter.state_offset_h.default"
    ]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target_modules": ["mixr"]}, "no module of MambaForCausalLM matched target_modules=['mixr']"),
        ({"target_modules": ["mixer", "mixr"]}, "no module of MambaForCausalLM matched ['mixr'] of target_modules"),
        ({"target_modules": ["in_proj"]}, "matched backbone.layers.0.mixer.in_proj, a Linear, which has no state"),
        ({"target_modules": "all-linear"}, "no module of MambaForCausalLM matched target_modules=['all-linear']"),
        ({"layers_to_transform": [0, 5]}, "layers_to_transform=[5] matched no mixer"),
        ({"rank": 9}, "rank=9 is more than the state size 8"),
    ],
    ids=str,
)
def test_wrong_targets_are_errors(tiny_mamba, kwargs, message):
    kinds = [type(m) for m in tiny_mamba.modules()]
    with pytest.raises(ValueError) as error:
        get_peft_model(tiny_mamba, StateOffsetConfig(**kwargs))
    assert message in str(error.value)
    if "rank" not in kwargs:
        assert "backbone.layers.0.mixer … backbone.layers.1.mixer" in str(error.value)
    assert [type(m) for m in tiny_mamba.modules()] == kinds


def test_model_without_mixers_is_an_error(make_config):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no mixer(.|\n)*LlamaAttention"):
        get_peft_model(LlamaForCausalLM(config), make_config())


def test_unpatching_under_an_adapter_is_refused(tiny_mamba):
    get_peft_model(tiny_mamba, StateOffsetConfig())
    with pytest.raises(ValueError, match="carries the adapters offset_adapter"):
        ssmtune.unpatch(tiny_mamba)


def test_lora_guard_of_peft_is_untouched(tiny_mamba):
    with pytest.raises(ValueError, match="out_proj"):
        get_peft_model(tiny_mamba, LoraConfig(target_modules=["out_proj"]))

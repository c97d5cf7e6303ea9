import copy

import pytest
import torch

from ssmtune.mixers import StateInputs, find_mixers, patch
from ssmtune.mixers.state_inputs import sum_state_inputs

peft = pytest.importorskip("peft")
TARGETS = ["in_proj", "x_proj", "dt_proj"]


def randomise(model):
    """Give every trainable tensor a value that makes a difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def check_trains_and_merges(model, tokens, assert_close):
    randomise(model)
    logits = model(tokens(2, 9)).logits
    logits.square().sum().backward()
    trainable = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert [name for name, grad in trainable.items() if grad is None or not grad.any()] == []
    with torch.no_grad():
        generated = model.eval().generate(input_ids=tokens(2, 5), max_new_tokens=6, do_sample=False)
        merged = model.merge_and_unload()
        assert_close("merged", merged(tokens(2, 9)).logits, logits, 1e-5)
        assert torch.equal(merged.generate(tokens(2, 5), max_new_tokens=6, do_sample=False), generated)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-peft", "peft-patch"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_lora_trains_every_tensor(make_mamba, tokens, assert_close, options, patch_first):
    model = make_mamba()
    base_logits = model(tokens(2, 9)).logits
    if patch_first:
        patch(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, **options))
    summary = patch(model)
    assert summary.names == tuple(f"base_model.model.backbone.layers.{i}.mixer" for i in range(2))
    assert_close("identity", base_logits, model(tokens(2, 9)).logits, 1e-5)
    check_trains_and_merges(model, tokens, assert_close)


def test_lora_on_dt_proj_has_no_effect_in_transformers(make_mamba, tokens, assert_close):
    # The reason for the test above: should this one fail, transformers has been repaired.
    model = make_mamba()
    base_logits = model(tokens(2, 9)).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dt_proj"]))
    randomise(model)
    assert_close("logits", base_logits, model(tokens(2, 9)).logits, 1e-6)


@pytest.mark.parametrize("config_class", ["LoHaConfig", "IA3Config"])
def test_other_methods_on_every_projection(make_mamba, tokens, assert_close, config_class):
    targets = [*TARGETS, "out_proj"]
    options = {"feedforward_modules": []} if config_class == "IA3Config" else {"r": 2}
    model = make_mamba(use_bias=True)
    model = peft.get_peft_model(model, getattr(peft, config_class)(target_modules=targets, **options))
    patch(model)
    check_trains_and_merges(model.train(), tokens, assert_close)


def test_lora_on_the_parameters_of_the_mixer(make_mamba, tokens):
    model = make_mamba()
    patch(model)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mixer.A_log"])
    model = peft.get_peft_model(model, config)
    randomise(model)
    model(tokens(2, 9)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name


def test_full_tuning_of_one_projection_bias(make_mamba, tokens, assert_close):
    theirs = make_mamba().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.endswith("dt_proj.bias"))
    ours = copy.deepcopy(theirs)
    patch(ours)
    for model in (theirs, ours):
        model(tokens(2, 9)).logits.square().sum().backward()
    for _, mixer in find_mixers(ours):
        expected = theirs.backbone.layers[mixer.layer_idx].mixer.dt_proj.bias.grad
        assert_close("dt_proj.bias", expected, mixer.dt_proj.bias.grad, 2e-5)


def test_offsets_enter_where_they_should(make_mamba, adapt, tokens, assert_close):
    model = make_mamba(num_hidden_layers=1)
    patch(model)
    mixer = find_mixers(model)[0][1]
    seen = {}
    mixer.in_proj.register_forward_hook(lambda module, args, output: seen.update(z=output.chunk(2, dim=-1)[1]))
    mixer.x_proj.register_forward_hook(lambda module, args, output: seen.update(C=output[..., -mixer.ssm_state_size :]))
    mixer.out_proj.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
    with torch.no_grad():
        model(tokens(2, 7))
        base = seen["y"]
        tensors = adapt(model, "state_offset", "output_offset")[0].tensors
        model(tokens(2, 7))
        read = torch.einsum("bln,dn->bld", seen["C"], tensors["state_offset"]) + tensors["output_offset"]
        assert_close("difference", read * torch.nn.functional.silu(seen["z"]), seen["y"] - base, 1e-5)


def test_adapters_of_one_mixer_add_up(make_mamba, adapt, tokens, assert_close):
    model = make_mamba()
    patch(model)
    base = model(tokens(2, 7)).logits
    first = adapt(model, "initial_state", "state_offset", name="first")
    second = adapt(model, "initial_state", "output_offset", name="second")
    both = model(tokens(2, 7)).logits
    for a, b in zip(first, second, strict=True):
        with torch.no_grad():
            a.tensors["initial_state"].add_(b.tensors["initial_state"])
            b.tensors["initial_state"].zero_()
    assert_close("sum", both, model(tokens(2, 7)).logits, 1e-5)
    for adapter in (*first, *second):
        adapter.enabled = False
    assert torch.equal(base, model(tokens(2, 7)).logits)


def test_every_input_of_an_adapter_gets_a_gradient(make_mamba, adapt, tokens):
    model = make_mamba().requires_grad_(False)
    patch(model)
    adapters = adapt(model, "initial_state", "state_offset", "output_offset", "conv_state")
    model(tokens(2, 7)).logits.square().sum().backward()
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            assert (tensor.grad != 0).all(), name


@pytest.mark.parametrize("seqlen", [1, 2, 3, 6])
def test_a_conv_state_is_what_the_convolution_sees_first(make_mamba, adapt, tokens, assert_close, seqlen):
    model = make_mamba(num_hidden_layers=1)
    patch(model)
    mixer = find_mixers(model)[0][1]
    seen = {}
    mixer.in_proj.register_forward_hook(lambda module, args, output: seen.update(x=output.chunk(2, dim=-1)[0]))
    mixer.x_proj.register_forward_pre_hook(lambda module, args: seen.update(u=args[0]))
    conv_state = adapt(model, "conv_state")[0].tensors["conv_state"]
    with torch.no_grad():
        model(tokens(2, seqlen))
        x = torch.cat([conv_state.expand(2, -1, -1), seen["x"].transpose(1, 2)], dim=-1)
        conv = mixer.conv1d
        expected = torch.nn.functional.conv1d(x, conv.weight, conv.bias, groups=conv.groups)
    assert_close("u", torch.nn.functional.silu(expected), seen["u"].transpose(1, 2), 1e-6)


@pytest.mark.parametrize("seqlen", [1, 2, 3, 4, 6])
def test_a_cached_conv_state_replaces_the_learned_one(make_mamba, adapt, tokens, assert_close, seqlen):
    model = make_mamba()
    patch(model)
    adapt(model, "conv_state", "initial_state")
    text = tokens(2, 8)
    with torch.no_grad():
        expected = model(text).logits
        first = model(text[:, :seqlen], use_cache=True)
        steps = [first.logits]
        for t in range(seqlen, 8):
            steps.append(model(text[:, t : t + 1], cache_params=first.cache_params, use_cache=True).logits)
    assert_close("logits", expected, torch.cat(steps, dim=1), 1e-5)


def test_state_inputs_of_a_batch_add_to_shared_ones(make_mamba):
    shared, batched = torch.ones(3, 2), torch.arange(4.0)[:, None, None].expand(4, 3, 2)
    total = StateInputs(initial_state=shared) + StateInputs(initial_state=batched, output_offset=torch.ones(3))
    assert torch.equal(total.initial_state, batched + 1)
    assert total.state_offset is None and torch.equal(total.output_offset, torch.ones(3))
    assert sum_state_inputs(make_mamba()) == StateInputs()

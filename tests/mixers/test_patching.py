import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.mamba import modeling_mamba

import ssmtune
from ssmtune.mixers import find_mixers, patch, patch_mixer, supports, unpatch, unpatch_mixer
from ssmtune.mixers.mamba import PatchedMambaMixer

MambaMixer = modeling_mamba.MambaMixer


class UnknownMixer(nn.Sequential):
    pass


def mixer_classes(model):
    return [type(module) for module in model.modules() if isinstance(module, MambaMixer)]


def test_patch_says_what_it_did(make_mamba):
    summary = patch(make_mamba())
    assert str(summary) == f"2 mixers -> {summary.backend}"
    assert summary.backend in ("cpu", "reference")
    assert summary.names == ("backbone.layers.0.mixer", "backbone.layers.1.mixer")
    assert str(patch(make_mamba(num_hidden_layers=1))).startswith("1 mixer -> ")


def test_patch_names_a_backend_that_was_asked_for(make_mamba):
    with ssmtune.backend("reference"):
        assert patch(make_mamba()).backend == "reference"


def test_patch_twice_is_patch_once(make_mamba):
    model = make_mamba()
    assert patch(model) == patch(model)
    assert mixer_classes(model) == [PatchedMambaMixer] * 2
    assert [patch_mixer(mixer) for _, mixer in find_mixers(model)] == [False, False]


def test_unpatch_restores(make_mamba):
    model = make_mamba()
    before = {name: (type(module), list(vars(module))) for name, module in model.named_modules()}
    patch(model)
    assert unpatch(model) == 2
    assert {name: (type(module), list(vars(module))) for name, module in model.named_modules()} == before
    assert unpatch(model) == 0


def test_patch_leaves_everything_else_alone(make_mamba):
    source = {name: value for name, value in vars(modeling_mamba).items() if callable(value)}
    forward = MambaMixer.forward
    model, other = make_mamba(), make_mamba()
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    patch(model)
    assert mixer_classes(other) == [MambaMixer] * 2
    assert {name: value for name, value in vars(modeling_mamba).items() if callable(value)} == source
    assert MambaMixer.forward is forward
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters


def test_patch_refuses_a_model_without_mixers():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no mixer to patch: found .*LlamaDecoderLayer \(2\)"):
        patch(llama)
    unknown = nn.ModuleList([UnknownMixer(nn.Linear(2, 2)) for _ in range(2)])
    with pytest.raises(ValueError, match=r"found UnknownMixer \(2\).*\n  Supported: MambaMixer"):
        patch(unknown)
    with pytest.raises(ValueError, match="Linear has no mixer to patch: found no submodules"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot patch Linear: it is not a mixer"):
        patch_mixer(nn.Linear(2, 2))


class OwnMixer(MambaMixer):
    pass


def test_a_subclass_of_the_user_is_left_alone_and_named(make_mamba):
    model = make_mamba()
    model.backbone.layers[1].mixer.__class__ = OwnMixer
    summary = patch(model)
    assert mixer_classes(model) == [PatchedMambaMixer, OwnMixer]
    assert str(summary).startswith(f"1 mixer -> {summary.backend} (1 left alone: backbone.layers.1.mixer: OwnMixer is")
    assert not supports(model.backbone.layers[1].mixer)
    with pytest.raises(ValueError, match="cannot patch OwnMixer: OwnMixer is a subclass of MambaMixer"):
        patch_mixer(model.backbone.layers[1].mixer)
    model.backbone.layers[0].mixer.__class__ = OwnMixer
    with pytest.raises(ValueError, match="all 2 are left alone; backbone.layers.0.mixer: OwnMixer is a subclass"):
        patch(model)


def test_a_forward_replaced_on_the_instance_is_left_alone_and_named(make_mamba):
    model = make_mamba()
    mixer = model.backbone.layers[0].mixer
    mixer.forward = lambda hidden_states, **_: hidden_states
    assert "replaced on the instance" in patch(model).skipped["backbone.layers.0.mixer"]
    assert mixer_classes(model) == [MambaMixer, PatchedMambaMixer]


def test_unpatch_refuses_mixers_with_adapters(make_mamba, adapt):
    model = make_mamba()
    patch(model)
    adapt(model, "state_offset")
    with pytest.raises(ValueError, match="it carries the adapters additions"):
        unpatch(model)
    assert mixer_classes(model) == [PatchedMambaMixer] * 2
    for _, mixer in find_mixers(model):
        del mixer.additions
        assert unpatch_mixer(mixer)
    assert mixer_classes(model) == [MambaMixer] * 2


@pytest.mark.parametrize("hooks", ["before", "after", "removed"])
def test_accelerate_hooks(make_mamba, tokens, hooks):
    hooks_module = pytest.importorskip("accelerate.hooks")
    model = make_mamba()
    expected = model(tokens(2, 6)).logits
    if hooks == "after":
        patch(model)
    for module in list(model.modules()):
        hooks_module.add_hook_to_module(module, hooks_module.AlignDevicesHook("cpu"))
    if hooks == "removed":
        hooks_module.remove_hook_from_submodules(model)
    patch(model)
    called = []
    mix = PatchedMambaMixer.mix
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PatchedMambaMixer, "mix", lambda self, *args: called.append(self) or mix(self, *args))
        torch.testing.assert_close(model(tokens(2, 6)).logits, expected)
        assert len(called) == 2
        unpatch(model)
        torch.testing.assert_close(model(tokens(2, 6)).logits, expected)
        assert len(called) == 2


def test_offloaded_weights(make_mamba, tokens):
    accelerate = pytest.importorskip("accelerate")
    model = make_mamba()
    expected = model(tokens(2, 6)).logits
    patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.backbone.layers[0].mixer.A_log.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 6)).logits, expected)


def test_pickle_and_deepcopy(make_mamba, tokens):
    model = make_mamba()
    patch(model)
    expected = model(tokens(2, 6)).logits
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert mixer_classes(twin) == [PatchedMambaMixer] * 2
        assert torch.equal(twin(tokens(2, 6)).logits, expected)


def test_save_pretrained_is_that_of_transformers(make_mamba, tokens, tmp_path):
    model = make_mamba()
    model.save_pretrained(tmp_path / "theirs")
    patch(model)
    model.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert mixer_classes(loaded) == [MambaMixer] * 2
    patch(loaded)
    assert torch.equal(loaded(tokens(2, 6)).logits, model(tokens(2, 6)).logits)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(make_mamba, adapt, tokens, use_reentrant):
    model = make_mamba().train()
    patch(model)
    adapt(model, "initial_state", "state_offset")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
def test_compile_fullgraph(make_mamba, adapt, tokens, assert_close, use_cache):
    torch._dynamo.reset()
    model = make_mamba(num_hidden_layers=1)
    patch(model)
    adapt(model, "initial_state", "state_offset", "output_offset")
    input_ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model(input_ids, attention_mask=mask, use_cache=use_cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(input_ids, attention_mask=mask, use_cache=use_cache)
    assert_close("logits", expected.logits[mask == 1], actual.logits[mask == 1], 1e-5)
    grads = []
    for output in (expected, actual):
        model.zero_grad()
        output.logits[mask == 1].square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, traced in zip(*grads, strict=True):
        assert_close("gradient", eager, traced, 1e-5)
    if use_cache:
        with torch.no_grad():
            expected = model(tokens(2, 1), cache_params=expected.cache_params, use_cache=True)
            actual = compiled(tokens(2, 1), cache_params=actual.cache_params, use_cache=True)
        assert_close("step", expected.logits, actual.logits, 1e-5)


@pytest.mark.slow
def test_compile_inductor(make_mamba, tokens, assert_close):
    torch._dynamo.reset()
    model = make_mamba(num_hidden_layers=1)
    patch(model)
    compiled = torch.compile(model, fullgraph=True)
    assert_close("logits", model(tokens(2, 6)).logits, compiled(tokens(2, 6), use_cache=False).logits, 1e-5)

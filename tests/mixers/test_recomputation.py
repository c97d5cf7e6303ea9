"""What a patched mixer makes again in its backward pass gives the gradients that keeping it gives."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from benchmarks.activation_memory import kept_bytes
from ssmtune import ops
from ssmtune.mixers import find_mixers, patch
from ssmtune.mixers.recomputation import Recomputation

ALL = ("initial_state", "state_offset", "output_offset", "conv_state")
EVERY_PROJECTION = ["in_proj", "x_proj", "dt_proj"]


@pytest.fixture(params=["mamba", "falcon_mamba", "jamba", "zamba"])
def family(request):
    return request.param


@pytest.fixture(params=["cheap", "scan"])
def model(request, make_mamba):
    made = make_mamba().train()
    patch(made, recompute=request.param)
    return made


@pytest.fixture
def keep(monkeypatch):
    """A function that calls another one while nothing is recomputed."""

    def keep(function, *args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(Recomputation, "__enter__", lambda self: self)
            return function(*args, **kwargs)

    return keep


def gradients(model, input_ids, **options):
    model.zero_grad()
    model(input_ids, labels=input_ids, use_cache=False, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(expected, actual):
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, actual[name]), name


@pytest.mark.parametrize("recompute", ["cheap", "scan"])
@pytest.mark.parametrize("batch", ["plain", "padded", "packed"])
def test_gradients_are_those_of_keeping_everything(make_family, adapt, tokens, keep, family, batch, recompute):
    model = make_family(family).train()
    patch(model, recompute=recompute)
    adapt(model, *ALL)
    options = {}
    if batch == "padded":
        options["attention_mask"] = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    elif batch == "packed":
        options["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    input_ids = tokens(1 if batch == "packed" else 2, 9)
    assert_equal(keep(gradients, model, input_ids, **options), gradients(model, input_ids, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("half", ["", "autocast", "base"])
def test_gradients_under_lora(model, tokens, keep, half, dropout):
    # The adapters of a base in bfloat16 are float32: they cast what they are given.
    base = model.to(torch.bfloat16 if half == "base" else torch.float32)
    config = LoraConfig(target_modules=EVERY_PROJECTION, r=2, init_lora_weights=False, lora_dropout=dropout)
    model = get_peft_model(base, config)

    def run():
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
            return gradients(model, tokens(2, 9))

    assert_equal(keep(run), run())


def test_each_module_is_called_once(model, tokens):
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    gradients(model, tokens(2, 9))
    assert len(calls) == len(set(calls))
    assert {name.rpartition(".")[2] for name in calls} >= {"in_proj", "x_proj", "dt_proj", "conv1d", "out_proj"}


@pytest.mark.parametrize("hooks", [False, True], ids=["checkpoint", "hooks-around"])
def test_inside_of_other_hooks(model, tokens, keep, hooks):
    expected = keep(gradients, model, tokens(2, 9))
    if hooks:
        with torch.autograd.graph.save_on_cpu():
            assert_equal(expected, gradients(model, tokens(2, 9)))
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(expected, gradients(model, tokens(2, 9)))


def test_gradient_checkpointing_keeps_the_input_alone(model):
    mixer = find_mixers(model)[0][1]
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    assert kept_bytes(mixer, lambda: checkpoint(mixer, hidden, use_reentrant=False)) == hidden.nbytes
    projected = []
    mixer.in_proj.register_forward_hook(lambda *args: projected.append(StorageWeakRef(args[-1].untyped_storage())))
    out = checkpoint(mixer, hidden, use_reentrant=False)
    assert out.requires_grad and [storage.expired() for storage in projected] == [True]


def test_a_graph_that_is_retained(model, tokens):
    loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    some = torch.autograd.grad(loss, [mixer.conv1d.weight for _, mixer in find_mixers(model)], retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    names = [name for name, _ in model.named_parameters()]
    for index, grad in enumerate(some):
        assert torch.equal(grad, first[names.index(f"backbone.layers.{index}.mixer.conv1d.weight")])


@pytest.mark.parametrize("name", ["conv1d.weight", "dt_proj.weight", "x_proj.weight", "out_proj.weight"])
def test_a_weight_changed_before_the_backward_pass_is_refused(model, tokens, name):
    loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
    with torch.no_grad():
        find_mixers(model)[0][1].get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|was changed in place"):
        loss.backward()


def test_a_result_changed_in_place_is_kept():
    x = torch.randn(3, requires_grad=True)
    with Recomputation() as made:
        y = made.by(torch.mul, x, 2)
        y.sin_()
        out = y.cos()
    out.sum().backward()
    assert torch.allclose(x.grad, -torch.sin(torch.sin(2 * x)) * 2 * torch.cos(2 * x))


def test_an_adapter_switched_before_the_backward_pass_changes_nothing(model, tokens, keep):
    config = LoraConfig(target_modules=EVERY_PROJECTION, r=2, init_lora_weights=False)
    model = get_peft_model(model, config)
    model.add_adapter("other", config)

    def run():
        model.set_adapter("default")
        model.zero_grad()
        loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.set_adapter("other")
        for parameter in parameters.values():
            parameter.requires_grad_(True)  # peft turns that off
        return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))

    assert_equal(keep(run), run())


def test_weights_given_for_one_call(model, tokens, keep):
    def run():
        given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        kwargs = {"labels": tokens(2, 9), "use_cache": False}
        loss = torch.func.functional_call(model, given, (tokens(2, 9),), kwargs).loss
        return dict(zip(given, torch.autograd.grad(loss, given.values(), materialize_grads=True), strict=True))

    assert_equal(keep(run), run())


def test_runs_on_the_backend_of_the_forward_pass(model, tokens, keep):
    def run():
        with ops.backend("reference"):
            loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
        return dict(enumerate(torch.autograd.grad(loss, list(model.parameters()))))

    assert_equal(keep(run), run())


def test_a_call_with_an_error_leaves_no_hooks_behind(model):
    mixer = find_mixers(model)[0][1]
    with pytest.raises(ValueError, match="attention_mask"):
        mixer(torch.randn(2, 9, 32), attention_mask=torch.ones(2, 3))
    hook = mixer.out_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mixer(torch.randn(2, 9, 32))
    hook.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_copies_keep_what_patch_was_told(model):
    told = find_mixers(model)[0][1].recompute
    assert find_mixers(copy.deepcopy(model))[0][1].recompute == told
    patch(model)
    assert find_mixers(model)[0][1].recompute == told
    patch(model, recompute="nothing")
    assert [mixer.recompute for _, mixer in find_mixers(model)] == ["nothing"] * 2
    with pytest.raises(ValueError, match="recompute is 'all', expected 'nothing', 'cheap', 'scan' or None"):
        patch(model, recompute="all")

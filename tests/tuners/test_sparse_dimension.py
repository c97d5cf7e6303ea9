"""A few channels and states of A, B and C, chosen by training all of them first."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

import ssmtune
from ssmtune import SparseDimensionConfig
from ssmtune.mixers import find_mixers
from ssmtune.tuners.sparse_dimension import choose_dimensions
from ssmtune.tuners.sparse_dimension.selection import most_important

CONFIG = {"channels": 0.05, "states": 0.3, "task_type": "CAUSAL_LM"}


def adapted(model, **options):
    return get_peft_model(model, SparseDimensionConfig(**CONFIG | options))


def layers(model):
    return [mixer.dimension_adapter for _, mixer in find_mixers(model)]


def chosen(model, seed=0):
    """A model whose dimensions a step of training in random directions has chosen."""

    def train(steps):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))

    choose_dimensions(model, train)
    return model


def test_those_that_changed_most_are_chosen():
    importance = torch.tensor([[1.0, 5, 2], [9, 0, 0], [0, 0, 1], [3, 0, 4]])
    channels, states = most_important(importance, 2, 2)
    assert channels.tolist() == [0, 1] and states.tolist() == [[1, 2], [0, 1]]
    channels, states = most_important(importance, 3, 1)
    assert channels.tolist() == [0, 1, 3] and states.tolist() == [[1], [0], [2]]


def test_all_are_trained_first_and_start_again_from_the_base(tiny_mamba, input_ids, logits):
    ssmtune.patch(tiny_mamba)
    base = logits(tiny_mamba, input_ids)
    model, seen = adapted(tiny_mamba, warm_up_steps=7), []
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(3, 2), (8, 3), (8, 3)] * 2

    def train(steps):
        assert steps == 7
        for layer in layers(model):
            tensors = [layer.tensors(kind)["default"] for kind in "ABC"]
            assert [tuple(t.shape) for t in tensors] == [(64, 8), (8, 64), (8, 64)]
            with torch.no_grad():
                for tensor in tensors:
                    tensor.normal_()
            seen.append(tensors[0].detach().square())

    choose_dimensions(model, train)
    for layer, importance in zip(layers(model), seen, strict=True):
        channels, states = most_important(importance, 3, 2)
        assert torch.equal(layer.tensors("channels")["default"], channels)
        assert torch.equal(layer.tensors("states")["default"], states)
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(3, 2), (8, 3), (8, 3)] * 2
    assert torch.equal(logits(model, input_ids), base)
    choose_dimensions(model, lambda steps: pytest.fail("they have been chosen"))


def test_merging_changes_the_chosen_entries_alone(tiny_mamba, make_nonzero, input_ids, logits, assert_close):
    plain = copy.deepcopy(tiny_mamba)
    model = make_nonzero(chosen(adapted(tiny_mamba)), std=0.5)
    expected, tensors = logits(model, input_ids), layers(model)
    merged = model.merge_and_unload()
    assert merged is tiny_mamba and not isinstance(merged.backbone.layers[0].mixer, ssmtune.mixers.StateAdapter)
    assert_close("logits", expected, logits(merged, input_ids), 1e-5)
    for layer, before, after in zip(tensors, plain.backbone.layers, merged.backbone.layers, strict=True):
        channels, states = layer.tensors("channels")["default"], layer.tensors("states")["default"]
        changed = (after.mixer.A_log != before.mixer.A_log).nonzero().tolist()
        assert changed == [[c, n] for c, own in zip(channels.tolist(), states.tolist(), strict=True) for n in own]
        columns = (after.mixer.x_proj.weight != before.mixer.x_proj.weight).nonzero()
        rank = before.mixer.time_step_rank
        assert columns[:, 0].unique().tolist() == list(range(rank, rank + 16))
        assert torch.equal(columns[:, 1].unique(), channels)


def test_every_tensor_learns(tiny_mamba, input_ids):
    report = ssmtune.check_gradients(chosen(adapted(tiny_mamba)), {"input_ids": input_ids, "labels": input_ids})
    assert report.ok and report.total == 6, str(report)


def test_the_chosen_ones_are_stored(tiny_mamba, make_nonzero, tmp_path, input_ids, logits):
    model = make_nonzero(chosen(adapted(tiny_mamba), seed=3))
    with torch.no_grad():
        expected = logits(model, input_ids)
    kept = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers(model)]
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32, torch.int64} and len(stored) == 10
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True).eval()
    for before, layer in zip(kept, layers(loaded), strict=True):
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert torch.equal(logits(loaded, input_ids), expected)
    choose_dimensions(loaded, lambda steps: pytest.fail("they have been chosen"))


@pytest.mark.parametrize("fault", [-1, 64, "twice"])
def test_stored_channels_that_cannot_be_are_refused(tiny_mamba, make_nonzero, tmp_path, fault):
    model = make_nonzero(chosen(adapted(tiny_mamba)))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in stored if "channels" in key)
    stored[key][0] = stored[key][1] if fault == "twice" else fault
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="sparse_dimension_channels of backbone.layers.0.mixer") as error:
        PeftModel.from_pretrained(model.unload(), tmp_path)
    assert len(str(error.value).splitlines()) == 2


def test_rows_with_adapters_of_their_own_are_refused(tiny_mamba, input_ids):
    model = adapted(tiny_mamba).eval()
    with pytest.raises(ValueError, match="a batch shares one A"):
        model(input_ids=input_ids, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("options", [{"channels": 0}, {"states": 1.5}, {"warm_up_steps": 0}], ids=str)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        SparseDimensionConfig(**options)
    assert len(str(error.value).splitlines()) == 2


def test_trainable_parameters_of_mamba_130m():
    with torch.device("meta"):
        base = MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24))
    # 15 of 1536 channels, 2 of 16 states
    assert adapted(base, channels=0.01, states=0.1).get_nb_trainable_parameters()[0] == 24 * (15 * 2 + 2 * 16 * 15)

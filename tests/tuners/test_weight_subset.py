import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import ssmtune
from ssmtune import WeightSubsetConfig

TOKENS = torch.arange(6).view(1, 6)
WEIGHTS = "adapter_model.safetensors"


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def adapted(model, *parameters, **settings):
    return get_peft_model(model, WeightSubsetConfig(task_type="CAUSAL_LM", parameters=list(parameters), **settings))


def trained(model, *parameters):
    """With other values in the tensors, as after training."""
    model = adapted(model, *parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def test_trains_what_the_expressions_are_found_in(tiny_mamba):
    model = adapted(tiny_mamba, r"1\.mixer\.dt_proj\.bias$", r"^backbone\.norm_f")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["base_model.model.backbone.layers.1.mixer.dt_proj.bias", "base_model.model.backbone.norm_f.weight"]


def test_only_the_trained_tensors_are_stored_and_they_load(tiny_mamba, tmp_path):
    base = {name: tensor.clone() for name, tensor in tiny_mamba.state_dict().items()}
    model = trained(tiny_mamba, r"embeddings", r"\.D$")
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    # the head is the embeddings: it is not stored a second time
    assert sorted(load_file(tmp_path / WEIGHTS)) == [
        "base_model.model.backbone.embeddings.weight",
        "base_model.model.backbone.layers.0.mixer.D",
        "base_model.model.backbone.layers.1.mixer.D",
    ]
    plain = model.unload()
    assert all(torch.equal(tensor, base[name]) for name, tensor in plain.state_dict().items())
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(loaded.unload(), tmp_path, is_trainable=True)
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 3


def test_disabling_puts_the_base_back_and_enabling_what_was_trained(tiny_mamba):
    before = logits(tiny_mamba)
    model = trained(tiny_mamba, r"\.bias$")
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after) and not torch.equal(after, before)


def test_merging_leaves_a_plain_model_with_the_trained_tensors(tiny_mamba):
    model = trained(tiny_mamba, r"\.bias$")
    after = logits(model)
    merged = model.merge_and_unload()
    assert merged is tiny_mamba and torch.equal(logits(merged), after)
    assert not hasattr(merged, "peft_config")


def test_an_expression_that_is_found_nowhere_is_refused(tiny_mamba):
    with pytest.raises(ValueError, match=r"parameters=\['nowhere'\] is found in the name of no parameter"):
        adapted(tiny_mamba, r"\.bias$", "nowhere")


@pytest.mark.parametrize("parameters, message", [([], "is empty"), (["("], "not a regular expression")])
def test_parameters_that_select_nothing_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message) as error:
        WeightSubsetConfig(parameters=parameters)
    assert len(str(error.value).splitlines()) == 2


def test_a_model_with_another_adapter_is_refused(tiny_mamba):
    get_peft_model(tiny_mamba, LoraConfig(target_modules=["in_proj"]), adapter_name="low")
    with pytest.raises(ValueError, match="already has low") as error:
        get_peft_model(tiny_mamba, WeightSubsetConfig(parameters=["bias"]), adapter_name="subset")
    assert list(tiny_mamba.peft_config) == ["low"] and len(str(error.value).splitlines()) == 2


def test_a_second_subset_is_refused(tiny_mamba):
    model = adapted(tiny_mamba, "bias")
    with pytest.raises(ValueError, match="cannot add 'second'.*already has default"):
        model.add_adapter("second", WeightSubsetConfig(parameters=["bias"]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "unplaced"])
def test_a_file_that_does_not_fit_is_refused(tiny_mamba, tmp_path, fault):
    model = trained(tiny_mamba, r"\.D$")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.backbone.layers.1.mixer.D"
    if fault == "missing":
        del tensors[key]
    elif fault == "shape":
        tensors[key] = tensors[key][1:].clone()
    elif fault == "nan":
        tensors[key][0] = float("nan")
    else:
        tensors["base_model.model.backbone.layers.2.mixer.D"] = tensors[key].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    expected = {
        "missing": "lacks 1 of 2 tensors, first backbone.layers.1.mixer.D",
        "shape": r"backbone.layers.1.mixer.D has shape \(63,\)",
        "nan": "backbone.layers.1.mixer.D holds 1 values",
        "unplaced": "has no place for, first backbone.layers.2.mixer.D",
    }
    with pytest.raises(ValueError, match=expected[fault]):
        PeftModel.from_pretrained(model.unload(), tmp_path)


def test_a_patched_model_trains_through_the_operators(tiny_mamba):
    ssmtune.patch(tiny_mamba)
    model = adapted(tiny_mamba, r"\.(A_log|D)$|bias$")
    report = ssmtune.check_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    assert report.ok, str(report)


def test_rows_of_a_batch_cannot_choose(tiny_mamba):
    model = trained(tiny_mamba, r"\.bias$")
    with pytest.raises(ValueError, match="adapter_names=.* cannot be used with a subset of weights"):
        model(input_ids=TOKENS, adapter_names=["__base__"])

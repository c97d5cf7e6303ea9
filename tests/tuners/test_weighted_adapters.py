"""Weighted sums of adapters."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from ssmtune.mixers import StateAdapter
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

GROUPS = {
    "offset-h": [StateOffsetConfig, StateOffsetConfig],
    "offset-y": [lambda **kw: StateOffsetConfig(target="y", **kw)] * 2,
    "offset-ranks": [lambda **kw: StateOffsetConfig(rank=2, alpha=8, **kw), lambda **kw: StateOffsetConfig(rank=3)],
    "offset-mixed": [lambda **kw: StateOffsetConfig(rank=2, dropout=0.5), StateOffsetConfig],
    "offset-mlp": [lambda **kw: StateOffsetConfig(reparametrize=3, **kw), StateOffsetConfig],
    "initial": [InitialStateConfig, InitialStateConfig],
    "initial-conv": [lambda **kw: InitialStateConfig(conv_state=True, **kw), InitialStateConfig],
    "initial-ranks": [
        lambda **kw: InitialStateConfig(rank=4),
        lambda **kw: InitialStateConfig(rank=2, conv_state=True),
    ],
}


def fill(model, adapter_name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter_name}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def build(model, configs):
    model = get_peft_model(model, configs[0], adapter_name="one")
    for index, config in enumerate(configs[1:]):
        model.add_adapter(["two", "three"][index], config)
    for seed, name in enumerate(model.peft_config):
        fill(model, name, seed)
    return model.eval()


def inputs(model, adapter_name):
    """What each mixer gets from one adapter, with None as zero."""
    model.set_adapter(adapter_name)
    given = [vars(m.state_inputs()) for m in model.modules() if isinstance(m, StateAdapter)]
    zero = torch.zeros(())
    return [{kind: zero if value is None else value.detach() for kind, value in each.items()} for each in given]


def check_sum(model, weights, adapter_name):
    parts = [inputs(model, name) for name in weights]
    for index, total in enumerate(inputs(model, adapter_name)):
        for kind, value in total.items():
            expected = sum(w * part[index][kind] for w, part in zip(weights.values(), parts, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_linear_is_the_weighted_sum(tiny_mamba, group, tmp_path, input_ids, logits):
    model = build(tiny_mamba, [make() for make in group])
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    check_sum(model, {"one": 0.5, "two": -2.0}, "sum")
    config = model.peft_config["sum"]
    assert (config.rank, config.dropout, config.reparametrize) == (None, 0.0, None)
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "sum")
    assert torch.equal(logits(loaded, input_ids), expected)


@pytest.mark.parametrize("group", ["offset-ranks", "initial-ranks"])
def test_cat_is_the_same_sum_of_a_rank(tiny_mamba, group):
    model = build(tiny_mamba, [make() for make in GROUPS[group]])
    ranks = [config.rank for config in model.peft_config.values()]
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].rank == sum(ranks) and model.peft_config["sum"].alpha is None
    check_sum(model, {"one": 0.5, "two": -2.0}, "sum")


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_adapters_of_different_layers(tiny_mamba, combination_type):
    configs = [StateOffsetConfig(rank=2, layers_to_transform=[0]), StateOffsetConfig(rank=3, target_modules=["mixer"])]
    model = build(tiny_mamba, configs)
    model.add_weighted_adapter(["one", "two"], [3.0, 1.5], "sum", combination_type)
    check_sum(model, {"one": 3.0, "two": 1.5}, "sum")
    model.add_weighted_adapter(["one"], [2.0], "twice", combination_type)
    check_sum(model, {"one": 2.0}, "twice")
    assert [name for name, _ in model.named_parameters() if name.endswith("_h.twice")] == [
        "base_model.model.backbone.layers.0.mixer.offset_adapter.state_offset_h.twice"
    ][: combination_type == "linear"]


def test_three_adapters_and_a_sum_of_sums(tiny_mamba):
    model = build(tiny_mamba, [InitialStateConfig(), InitialStateConfig(), InitialStateConfig(conv_state=True)])
    model.add_weighted_adapter(["one", "two", "three"], [1, 2, 3], "first")
    model.add_weighted_adapter(["first", "one"], [1, -1], "second")
    check_sum(model, {"two": 2.0, "three": 3.0}, "second")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (["one", "none"], [1, 1], "sum"),
            "there is no adapter 'none'.\n  Adapters of StateOffsetModel here: one, two",
        ),
        (([], [], "sum"), "cannot sum []: it is empty"),
        ((["one", "two"], [1], "sum"), "weights=[1] do not fit 2 adapters"),
        ((["one", "two"], [1, float("nan")], "sum"), "weights=[1, nan] do not fit 2 adapters"),
        ((["one", "two"], [1, 1], "two"), "already has an adapter named 'two'"),
        ((["one", "two"], [1, 1], "half"), "'half' cannot be the name of an adapter"),
        ((["one", "two"], [1, 1], "sum", "svd"), "combination_type='svd' is not known"),
        (
            (["one", "two"], [1, 1], "sum", "cat"),
            "combination_type='cat' needs adapters of a rank, which 'one' has not",
        ),
        ((["one", "three"], [1, 1], "sum"), "cannot sum adapters of different targets: 'one' 'h', 'three' 'y'"),
    ],
    ids=["unknown", "empty", "few-weights", "nan", "taken", "name", "type", "cat", "targets"],
)
def test_what_cannot_be_summed_is_an_error(tiny_mamba, arguments, message):
    configs = [StateOffsetConfig(), StateOffsetConfig(rank=2), StateOffsetConfig(target="y")]
    model = build(tiny_mamba, configs)
    with pytest.raises(ValueError) as error:
        model.add_weighted_adapter(*arguments)
    assert message in str(error.value) and str(error.value).count("\n") <= 3
    assert list(model.peft_config) == ["one", "two", "three"]


def test_modules_trained_in_full_cannot_be_summed(tiny_mamba):
    model = build(tiny_mamba, [StateOffsetConfig(modules_to_save=["norm_f"]), StateOffsetConfig()])
    with pytest.raises(ValueError, match="'one' has modules trained in full"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum")


def test_ranks_beyond_the_state_size_leave_no_trace(tiny_mamba):
    model = build(tiny_mamba, [StateOffsetConfig(rank=6), StateOffsetConfig(rank=6)])
    with pytest.raises(ValueError, match="rank=12 is more than the state size 8"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum", "cat")
    assert "sum" not in model.peft_config
    model.add_weighted_adapter(["one", "two"], [1, 1], "sum")
    check_sum(model, {"one": 1.0, "two": 1.0}, "sum")

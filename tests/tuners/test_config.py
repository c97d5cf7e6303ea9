import dataclasses
import json

import pytest
from peft import PeftConfig, PeftType

from ssmtune.tuners import InitialStateConfig, StateOffsetConfig


def test_defaults_adapt_every_mixer_in_full():
    config = StateOffsetConfig(task_type="CAUSAL_LM")
    assert (config.peft_type, config.target, config.rank, config.alpha) == (PeftType.STATE_OFFSET, "h", None, None)
    assert config.target_modules is None and config.init_weights
    assert InitialStateConfig().peft_type is PeftType.INITIAL_STATE


@pytest.mark.parametrize("config_cls", [StateOffsetConfig, InitialStateConfig])
def test_every_field_has_help(config_cls):
    own = [f for f in dataclasses.fields(config_cls) if f.name not in {g.name for g in dataclasses.fields(PeftConfig)}]
    assert own
    for field in own:
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target": "x"}, "target must be 'h' or 'y', got 'x'"),
        ({"target": "y", "rank": 4}, "rank=4 does not go with target 'y'"),
        ({"rank": 0}, "rank must be None or an integer of at least 1, got 0"),
        ({"rank": -1}, "got -1"),
        ({"rank": 2.0}, "got 2.0"),
        ({"rank": True}, "got True"),
        ({"rank": "4"}, "got '4'"),
        ({"alpha": 8}, "alpha=8 was given without a rank"),
        ({"rank": 2, "alpha": 0}, "alpha must be a positive number, got 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"dropout": 0.1}, "dropout=0.1 was given without a rank"),
        ({"rank": 2, "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"rank": 2, "dropout": -0.1}, "got -0.1"),
        ({"rank": 2, "dropout": "0.1"}, "got '0.1'"),
        ({"reparametrize": 0}, "reparametrize must be None or an integer of at least 1, got 0"),
        ({"reparametrize": True}, "got True"),
        ({"reparametrize": 8, "rank": 2}, "reparametrize=8 does not go with rank=2"),
        ({"layers_pattern": "layers"}, "without layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": r".*mixer"}, "regular expression"),
        ({"task_type": "CAUSAL"}, "Invalid task type"),
    ],
    ids=str,
)
def test_wrong_values_are_errors_that_say_what_to_do(kwargs, message):
    with pytest.raises(ValueError) as error:
        StateOffsetConfig(**kwargs)
    assert message in str(error.value)
    assert str(error.value).count("\n") <= 3


@pytest.mark.parametrize(
    "config",
    [
        StateOffsetConfig(target="y", target_modules=["mixer"], layers_to_transform=[0, 2]),
        StateOffsetConfig(rank=4, alpha=8, exclude_modules=["0.mixer"], modules_to_save=["lm_head"]),
        InitialStateConfig(rank=2, dropout=0.1, task_type="CAUSAL_LM"),
        InitialStateConfig(conv_state=True),
    ],
    ids=["y", "rank", "initial", "conv"],
)
def test_save_and_load(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert type(config).from_pretrained(tmp_path) == config

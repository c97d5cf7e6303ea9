import argparse

import pytest

from ssmtune.cli.config_flags import add_flags, flag_values
from ssmtune.config import ConfigError, RunConfig
from ssmtune.config_files import find_recipe, load_config, recipe_names, to_yaml


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_numbers_are_read_by_their_declared_type(tmp_path):
    # YAML itself reads 5e-3 as text
    config = load_config(write(tmp_path, "train: {lr: 5e-3, steps: 1e3, warmup: 0}\nmethod: {layers: [0, 2]}\n"))
    assert (config.train.lr, config.train.steps, config.train.warmup) == (5e-3, 1000, 0.0)
    assert isinstance(config.train.steps, int) and isinstance(config.train.warmup, float)
    assert config.method.layers == [0, 2]


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        "modle: x\ntrain: {step: 5, lr: fast, batch_size: big, warmup: 2, keep: first}\ndata: 3\neval: {every: 0}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines()[1:] == [
        "  modle: unknown key; did you mean 'model'?",
        "  train.step: unknown key; did you mean 'steps'?",
        "  train.lr: expected a number, got 'fast'",
        "  train.batch_size: expected int, got 'big'",
        "  train.warmup: expected at most 1, got 2.0",
        "  train.keep: expected one of last, best, got 'first'",
        "  data: expected a section, got 3",
        "  eval.every: expected at least 1, got 0",
    ]


@pytest.mark.parametrize("value", ["1.5", "true", "nan", "[1, 2]", "1e400"])
def test_what_is_not_an_int_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="train.steps: expected int"):
        load_config(write(tmp_path, f"train: {{steps: {value}}}\n"))


@pytest.mark.parametrize("value", ["nan", "inf", "true", "''"])
def test_what_is_not_a_finite_number_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="train.weight_decay: expected a number"):
        load_config(write(tmp_path, f"train: {{weight_decay: {value}}}\n"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: {lr: 1\n", "not valid YAML at line"),
        ("train:\n  lr: 1\n  lr: 2\n", "key 'lr' is given twice"),
        ("- a\n- b\n", "holds a list"),
    ],
)
def test_broken_yaml_is_explained(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_text_is_explained(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(path)


def test_resolved_configuration_reads_back_equal(tmp_path):
    config = load_config(None, {"train.lr": "3e-4", "method.name": "lora", "method.target_modules": "in_proj,x_proj"})
    assert config.method.target_modules == ["in_proj", "x_proj"]
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_overrides_win_and_are_checked(tmp_path):
    path = write(tmp_path, "method: lora\ntrain: {steps: 5}\n")
    config = load_config(path, {"train.steps": "7", "train.lr": None})
    assert (config.train.steps, config.method.name) == (7, "lora")
    with pytest.raises(ConfigError, match="train.steps: expected int, got 'x'"):
        load_config(path, {"train.steps": "x"})


def test_optional_values_can_be_unset(tmp_path):
    assert load_config(write(tmp_path, "method: {rank: 4}\n"), {"method.rank": "none"}).method.rank is None


def test_flags_are_made_from_the_dataclasses(capsys):
    parser = argparse.ArgumentParser(prog="x", allow_abbrev=False)
    add_flags(parser)
    args = parser.parse_args(["--train.lr", "5e-3", "--train.gradient_checkpointing", "--method.rank", "4"])
    config = load_config(None, flag_values(args))
    assert config.train.lr == 5e-3 and config.train.gradient_checkpointing is True and config.method.rank == 4
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--train.lrr", "1"])
    assert stopped.value.code == 2 and "--train.lrr" in capsys.readouterr().err
    text = parser.format_help()
    assert "peak learning rate" in text and "(default: 1000)" in text


def test_every_recipe_is_valid():
    names = recipe_names()
    assert "mamba-5m/state_offset.yaml" in names
    for name in names:
        if "compare" not in name:
            assert isinstance(load_config(name), RunConfig)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mamba-5m/lora.yaml'"):
        find_recipe("mamba-5m/lorra.yaml")

import pytest

from ssmtune.cli.main import main
from ssmtune.config_files import RECIPES, recipe_names


def test_recipes_are_listed_with_their_titles(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert any("LoRA" in line for line in lines)


def test_show_prints_the_file(capsys):
    assert main(["recipes", "show", "mamba-5m/lora"]) == 0
    assert capsys.readouterr().out == (RECIPES / "mamba-5m/lora.yaml").read_text()


def test_copy_writes_the_file_once(tmp_path, capsys):
    for destination in (tmp_path, tmp_path / "own.yaml"):
        assert main(["recipes", "copy", "mamba-5m/lora.yaml", str(destination)]) == 0
    assert (tmp_path / "own.yaml").read_text() == (tmp_path / "lora.yaml").read_text()
    assert main(["recipes", "copy", "mamba-5m/lora.yaml", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_unknown_and_missing_names_are_explained(capsys):
    assert main(["recipes", "show", "mamba-5m/lorra.yaml"]) == 2
    assert "did you mean 'mamba-5m/lora.yaml'" in capsys.readouterr().err
    assert main(["recipes", "show"]) == 2
    assert "needs a name" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_header_of_a_recipe_is_a_command_with_its_name(name):
    lines = (RECIPES / name).read_text().splitlines()
    assert lines[0].startswith("# ") and f"--config {name}" in lines[1]


@pytest.mark.parametrize("name", [name for name in recipe_names() if "compare" not in name])
def test_recipe_trains(name, tiny_checkpoint, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the sea is", "completion": "blue"}\n' * 8)
    command = ["train", tiny_checkpoint, "--config", name, "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*command, "--train.steps", "2", "--eval.max_new_tokens", "2", "--quiet"]) == 0
    assert "done     2 steps" in capsys.readouterr().out

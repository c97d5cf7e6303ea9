"""docs/extending.md, followed to the letter."""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ssmtune.comparison import ComparisonConfig
from ssmtune.config import ConfigError
from ssmtune.extensions import import_modules
from ssmtune.methods import METHODS, Method, register_method
from ssmtune.tasks import TASKS, register_task

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of the page."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == ["decay_tuner.py", "my_methods.py", "reversal.py", "my_tasks.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    return tmp_path


def ssmtune(folder: Path, *commands: str) -> str:
    """What commands print that run one after the other in a process of their own."""
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1", "SSMTUNE_LAZY": "1"}
    lists = [shlex.split(command)[1:] for command in commands]
    script = f"import sys; from ssmtune.cli.main import main; sys.exit(sum(main(words) for words in {lists}))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_works_as_it_stands(folder, tiny_checkpoint):
    (commands,) = re.findall(r"```\n(ssmtune compare.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    compare, train, generate = commands.strip().splitlines()
    compare, train = (command.replace("mamba-5m", tiny_checkpoint) for command in (compare, train))
    ssmtune(folder, f"{train} --quiet", f"{compare} --quiet --limit train=16,dev=4,test=4 --measure none")
    for method, tensors in {"decay": "decay_tuning_a", "state-offset": "state_offset_h"}.items():
        (file,) = (folder / "runs/own/cells/final").glob(f"reversal--{method}--final*.json")
        cell = json.loads(file.read_text())
        assert cell["status"] == "success", cell["error"]
        assert all(check["passed"] for check in cell["checks"]) and len(cell["checks"]) == 5
        assert "exact_match" in cell["metrics"]["test"]
        adapter = folder / f"runs/own/adapters/reversal/{method}"
        stored = load_file(adapter / "adapter_model.safetensors")
        assert len(stored) == 2 and all(name.endswith(tensors) and tensor.any() for name, tensor in stored.items())
    assert len(load_file(folder / "runs/one/adapter/adapter_model.safetensors")) == 2
    assert ssmtune(folder, generate).startswith("a b c d backwards:")


def test_a_module_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="--import no_such_module: Python finds no module") as error:
        import_modules(["no_such_module"])
    assert len(str(error.value).splitlines()) == 2


def test_a_configuration_imports_its_modules_in_another_process_too(tmp_path, monkeypatch):
    (tmp_path / "some_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    handed_over = pickle.dumps(ComparisonConfig(imports=["some_module"]))
    del sys.modules["some_module"]
    assert pickle.loads(handed_over).imports == ["some_module"] and "some_module" in sys.modules


def test_what_a_module_lacks_itself_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        import_modules(["needs_more"])


def test_a_name_is_given_once(monkeypatch):
    for known in (METHODS, TASKS):
        for name in list(known):
            monkeypatch.setitem(known, name, known[name])
    with pytest.raises(ConfigError, match="there is a method 'lora' already: LoRA"):
        register_method(Method("lora", "Another", 1e-3, "weights", lambda model, options: model))
    register_method(METHODS["lora"])
    with pytest.raises(ConfigError, match="there is a task 'e2e' already"):
        register_task("e2e", "another", lambda name, data_dir: None)


def test_an_adapter_file_imports_nothing(tmp_path, tiny_mamba):
    from peft import get_peft_model

    from ssmtune import StateOffsetConfig
    from ssmtune.stored_adapters import load_adapter

    model = get_peft_model(tiny_mamba, StateOffsetConfig())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"peft_type": "DECAY_TUNING", "imports": ["antigravity"], "auto_mapping": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--import its module"):
        load_adapter(model.unload(), tmp_path)
    assert "antigravity" not in sys.modules

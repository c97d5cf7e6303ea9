import dataclasses
import json
import sys

import pytest

from ssmtune.comparison import ComparisonConfig
from ssmtune.config import ConfigError
from ssmtune.tasks import TASKS, load_task


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown task 'docstring-packages'; did you mean 'docstring-package'"):
        load_task("docstring-packages")


def test_compare_names_the_nearest_task_or_all():
    with pytest.raises(ConfigError, match="task 'sst-2' is unknown; did you mean 'sst2'?"):
        ComparisonConfig(tasks=["sst-2"]).check()
    with pytest.raises(ConfigError, match="task 'zzz' is unknown; there are .*, e2e, webnlg, .*, files"):
        ComparisonConfig(tasks=["zzz"]).check()


@pytest.fixture
def files(tmp_path):
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"prompt": f"{split} {i}", "completion": "yes"}) for i in range(10)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_files_task_reads_three_files(files):
    task = load_task("files", files)
    assert task.sizes() == {"train": 10, "dev": 10, "test": 10}
    assert (task.dev[0].prompt, task.dev[0].target) == ("validation 0", " yes")


def test_files_task_names_what_is_missing(files):
    (files / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"(?s)lacks test\.jsonl or test\.csv or test\.tsv.*prompt and comp"):
        load_task("files", files)


def test_limit_takes_a_number_or_one_per_split(files):
    assert load_task("files", files, limit=3).sizes() == {"train": 3, "dev": 3, "test": 3}
    limited = load_task("files", files, limit={"test": 4})
    assert limited.sizes() == {"train": 10, "dev": 10, "test": 4}
    order = [int(example.prompt.split()[1]) for example in limited.test]
    assert order == sorted(order)
    with pytest.raises(ValueError, match="unknown splits"):
        load_task("files", files, limit={"tst": 4})
    with pytest.raises(ValueError, match="limit of test is 0"):
        load_task("files", files, limit={"test": 0})


def test_every_task_is_listed_and_has_a_module():
    from importlib import import_module

    from ssmtune import tasks
    from ssmtune.tasks.glue import GLUE

    assert set(GLUE) <= set(TASKS)
    for name, line in TASKS.items():
        assert callable(import_module(f"ssmtune.tasks.{tasks._MODULES.get(name, name)}").load)
        assert len(line) < 90


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith(("docstring-", "probe-"))])
def test_a_task_that_reads_files_says_which(name, tmp_path):
    with pytest.raises(ConfigError, match=f"task {name} reads its data from disk, and no --data-dir was given"):
        load_task(name)
    with pytest.raises(ConfigError, match=f"task {name}: .* lacks "):
        load_task(name, tmp_path)


def test_hub_names_need_datasets_that_never_run_code(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ConfigError, match=r"(?s)datasets 3\.6\.0 may run code from the hub.*\n  Run: pip install -U"):
        load_task("sst2", "nyu-mll/glue")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"(?s)'nyu-mll/glue' is not a local file.*pip install datasets"):
        load_task("sst2", "nyu-mll/glue")


def test_fingerprint_tells_groups_apart(files):
    task = load_task("files", files)
    grouped = dataclasses.replace(task, test=[dataclasses.replace(e, group="seen") for e in task.test])
    assert grouped.fingerprint() != task.fingerprint()

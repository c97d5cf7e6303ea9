import json

import pytest

from ssmtune.config import ConfigError
from ssmtune.tasks import load_task


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown task 'docstring-packages'; did you mean 'docstring-package'"):
        load_task("docstring-packages")


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
    with pytest.raises(ValueError, match=r"lacks test\.jsonl \(or \.csv\)"):
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

import ast
import re
import sys
import textwrap
from collections import Counter, defaultdict

import pytest

from ssmtune.tasks import load_task
from ssmtune.tasks.docstrings import PACKAGES, continuation_task, harvest, package_task


@pytest.fixture(scope="module")
def package():
    return package_task()


@pytest.fixture(scope="module")
def continuation():
    return continuation_task()


def words_of(text):
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def test_package_task_is_balanced_where_it_is_measured(package):
    for split, each in (("dev", 16), ("test", 32)):
        assert Counter(example.target for example in getattr(package, split)) == {f" {name}": each for name in PACKAGES}
    train = Counter(example.target for example in package.train)
    assert set(train) == set(package.choices)
    assert max(train.values()) <= 2 * min(train.values())


def test_package_task_does_not_give_the_answer_away(package):
    for example in package.train + package.dev + package.test:
        shown = example.prompt.removesuffix(" Package:").lower()
        assert not set(re.findall(r"[a-z0-9_]+", shown)) & set(PACKAGES), shown


def test_package_task_splits_share_no_text(package):
    texts = [{words_of(example.prompt) for example in split} for split in (package.train, package.dev, package.test)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert [len(split) for split in texts] == list(package.sizes().values())


def test_package_task_splits_share_no_class(package):
    homes = defaultdict(set)
    for docstring in harvest(packages=PACKAGES):
        homes[words_of(docstring.text)[:60]].add((docstring.module, docstring.scope))
    seen = {}
    for split in ("train", "dev", "test"):
        for example in getattr(package, split):
            scopes = homes[words_of(example.prompt)[:60]]
            if len(scopes) == 1:
                assert seen.setdefault(*scopes, split) == split, scopes
    assert len(seen) > 200


def test_continuation_task_splits_share_no_module_and_no_text(continuation):
    sizes = continuation.sizes()
    assert sizes["train"] > 1000 and sizes["dev"] > 100 and sizes["test"] > 100
    whole = {split: {words_of(e.prompt + e.target) for e in getattr(continuation, split)} for split in sizes}
    assert not whole["train"] & whole["test"] and not whole["train"] & whole["dev"] and not whole["dev"] & whole["test"]
    for example in continuation.test:
        assert example.target.startswith(" ")
        assert abs(len(example.prompt.split()) - len(example.target.split())) <= 1


@pytest.mark.parametrize("name", ["docstring-package", "docstring-continuation"])
def test_load_task_is_the_same_every_time(name):
    assert load_task(name).fingerprint() == load_task(name).fingerprint()
    once, again = load_task(name, limit=20, seed=3), load_task(name, limit=20, seed=3)
    assert once == again and once.sizes() == {"train": 20, "dev": 20, "test": 20}
    assert load_task(name, limit=20, seed=4).fingerprint() != once.fingerprint()


def test_harvest_is_the_same_every_time():
    assert harvest.__wrapped__(packages=("http", "email")) == harvest.__wrapped__(packages=("http", "email"))


def test_harvest_parses_and_never_imports(tmp_path):
    (tmp_path / "bomb.py").write_text(
        textwrap.dedent('''
        """The module."""
        raise SystemExit("imported")

        class Outer:
            """A class."""
            def method(self):
                """A method."""
                def inner():
                    """Deep inside."""
    ''')
    )
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Not documentation."""')
    found = [(d.module, d.scope, d.text) for d in harvest(tmp_path)]
    assert found == [
        ("bomb.py", "", "The module."),
        ("bomb.py", "Outer", "A class."),
        ("bomb.py", "Outer", "A method."),
        ("bomb.py", "Outer", "Deep inside."),
    ]
    assert "bomb" not in sys.modules


def test_harvest_of_a_stripped_python_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)no Python source files under.*--task e2e"):
        list(harvest(tmp_path))


def test_harvest_finds_real_docstrings():
    texts = {docstring.text for docstring in harvest(packages=("http",))}
    import http.client

    tree = ast.parse(open(http.client.__file__, "rb").read())
    assert ast.get_docstring(tree) in texts

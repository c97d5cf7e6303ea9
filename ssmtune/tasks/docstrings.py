"""Two tasks made of the docstrings of Python's own standard library: real text on every machine, offline.

The library's source files are parsed, never imported. The examples depend on the Python version alone.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ssmtune.data import Example
from ssmtune.tasks.choice import ChoiceTask
from ssmtune.tasks.continuation import ContinuationTask
from ssmtune.tasks.task import content_hash

# Eight packages that every CPython from 3.10 to 3.13 has, also where tkinter or idlelib are packaged apart,
# each with more than 130 docstrings.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")

# Test suites are not documentation; the rest is installed by others or is a second copy of a C module's docs.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "ensurepip"}
SKIPPED_FILES = {"_pydecimal.py", "_pydatetime.py", "_pyio.py", "pydoc_data"}

TEST_PER_PACKAGE = 32
DEV_PER_PACKAGE = 16
TRAIN_PER_PACKAGE = 120
PACKAGE_WORDS = (5, 24)
CONTINUATION_WORDS = (24, 80)


@dataclass(frozen=True)
class Docstring:
    """One docstring, the file it is in, and the top-level class or function it belongs to ("" for the module)."""

    module: str
    scope: str
    text: str

    @property
    def package(self) -> str:
        return self.module.split("/")[0]


@lru_cache(maxsize=4)
def harvest(root: Path | None = None, packages: tuple[str, ...] = ()) -> tuple[Docstring, ...]:
    """Docstrings below `root` in the order of their file names.

    Args:
        root: a folder of source files; this Python's standard library by default.
        packages: the packages to look at; all files by default.

    Raises:
        RuntimeError: there are no source files there (a stripped or frozen Python).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = (path for folder in packages for path in (root / folder).rglob("*.py")) if packages else root.rglob("*.py")
    files = [
        path
        for path in sorted(paths)
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and path.name not in SKIPPED_FILES
    ]
    if not files:
        raise RuntimeError(
            f"no Python source files under {root}, and the docstring tasks are made of them.\n"
            "  This Python was installed without its library's sources.\n"
            "  Use another Python, or --task e2e --data-dir DIR."
        )
    found: list[Docstring] = []
    for path in files:
        with warnings.catch_warnings():
            # Old escapes in the library's own strings warn at every parse.
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                # Templates and bad-syntax samples that some distributions ship.
                continue
        found += _docstrings_of(tree, path.relative_to(root).as_posix(), "")
    return tuple(found)


def _docstrings_of(node: ast.AST, module: str, scope: str) -> Iterator[Docstring]:
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, (ast.Module, *definitions)) and (text := ast.get_docstring(node)):
        yield Docstring(module, scope, text)
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, definitions) and not scope else scope
        yield from _docstrings_of(child, module, inner)


def _without_near_duplicates(docstrings: list[Docstring]) -> list[Docstring]:
    """Drops texts that share their first dozen words with an earlier one, or all their words."""
    kept, seen = [], set()
    for docstring in docstrings:
        words = re.findall(r"[a-z]+", docstring.text.lower())
        keys = {("start", *words[:12]), ("words", *sorted(set(words)))}
        if not keys & seen:
            kept.append(docstring)
        seen |= keys
    return kept


def load(name: str, data_dir: str | Path | None) -> ChoiceTask | ContinuationTask:
    """`docstring-package` or `docstring-continuation`; neither reads any `data_dir`."""
    return package_task() if name == "docstring-package" else continuation_task()


def package_task(root: Path | None = None) -> ChoiceTask:
    """`docstring-package`: which of eight packages does a docstring document?

    The first 24 words of each docstring of at least five words. The eight names themselves are blanked out as words
    (they would answer the question); longer identifiers such as HTTPServer stay. Near-duplicates are dropped. All
    docstrings of one top-level class or function are in the same split. Dev and test have the same number of each
    package.
    """
    names = re.compile(rf"\b({'|'.join(PACKAGES)})\b", re.IGNORECASE)
    shortest, longest = PACKAGE_WORDS
    candidates = []
    for docstring in harvest(root, PACKAGES):
        words = names.sub("___", docstring.text).split()
        if len(words) >= shortest:
            candidates.append(Docstring(docstring.module, docstring.scope, " ".join(words[:longest])))
    by_package: dict[str, list[Docstring]] = defaultdict(list)
    for docstring in _without_near_duplicates(candidates):
        by_package[docstring.package].append(docstring)

    splits: dict[str, list[Example]] = {"test": [], "dev": [], "train": []}
    quotas = {"test": TEST_PER_PACKAGE, "dev": DEV_PER_PACKAGE, "train": TRAIN_PER_PACKAGE}
    for package in PACKAGES:
        groups: dict[tuple[str, str], list[Docstring]] = defaultdict(list)
        for docstring in by_package[package]:
            groups[docstring.module, docstring.scope].append(docstring)
        # Large classes last, which is train: one class of 40 methods would be all of a test split.
        order = sorted(groups, key=lambda group: (len(groups[group]) > 8, content_hash(*group)))
        remaining = iter(order)
        for split, quota in quotas.items():
            taken: list[Docstring] = []
            while len(taken) < quota and (group := next(remaining, None)) is not None:
                taken += groups[group]
            examples = [_package_example(docstring.text, package) for docstring in taken]
            splits[split] += sorted(examples, key=lambda example: content_hash(example.prompt))[:quota]
    for split, examples in splits.items():
        if len(examples) < len(PACKAGES):
            raise RuntimeError(
                f"docstring-package: only {len(examples)} docstrings for the {split} split.\n"
                "  This Python's standard library is incomplete. Use a full CPython 3.10 or newer."
            )
        # Shuffled, so that a plain prefix of a split holds every package.
        examples.sort(key=lambda example: content_hash("order", example.prompt))
    return ChoiceTask(
        name="docstring-package",
        metric="accuracy",
        higher_is_better=True,
        **splits,
        choices=tuple(f" {package}" for package in PACKAGES),
        max_length=128,
        description="tell from a docstring of Python's standard library which of eight packages it documents; "
        "accuracy in %, the answer is the package name of highest likelihood",
    )


def _package_example(text: str, package: str) -> Example:
    return Example(prompt=f"{text} Package:", target=f" {package}")


def continuation_task(root: Path | None = None) -> ContinuationTask:
    """`docstring-continuation`: the second half of a docstring, given the first.

    Docstrings of at least 24 words, cut at 80, white space collapsed, halved at a word. All docstrings of one module
    are in the same split: 15 % of the modules for test, 10 % for dev, chosen by a hash of their name.
    """
    shortest, longest = CONTINUATION_WORDS
    texts = []
    for docstring in harvest(root):
        words = docstring.text.split()
        if len(words) >= shortest:
            texts.append(Docstring(docstring.module, docstring.scope, " ".join(words[:longest])))
    splits: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for docstring in _without_near_duplicates(texts):
        words = docstring.text.split()
        half = len(words) // 2
        share = content_hash("module", docstring.module) % 100
        split = "test" if share < 15 else "dev" if share < 25 else "train"
        splits[split].append(Example(prompt=" ".join(words[:half]), target=" " + " ".join(words[half:])))
    for split, examples in splits.items():
        if not examples:
            raise RuntimeError(
                f"docstring-continuation: no docstrings for the {split} split.\n"
                "  This Python's standard library is incomplete. Use a full CPython 3.10 or newer."
            )
        examples.sort(key=lambda example: content_hash("order", example.prompt))
    return ContinuationTask(
        name="docstring-continuation",
        metric="perplexity",
        higher_is_better=False,
        **splits,
        max_length=256,
        description="continue a docstring of Python's standard library; perplexity per token of the second half, "
        "given the first",
    )

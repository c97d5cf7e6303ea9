"""Every method of the registry on every family, by the checks that a comparison makes before it trains.

docs/capabilities.json holds what they found, and docs/capabilities.md shows it.
"""

import copy
import json
from importlib.metadata import version

import capabilities_page
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssmtune import prechecks
from ssmtune.data import Collator, Example, encode_all
from ssmtune.methods import METHODS, apply_method
from ssmtune.prechecks import run_prechecks

EXAMPLES = [Example("the sea", " is deep"), Example("a longer prompt", " has an end")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {token: i for i, token in enumerate(["<end>", "Ġ", *map(chr, range(ord("a"), ord("z") + 1))])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def probe(name: str, base, tokenizer) -> dict:
    """The entry of one method: what each check came to, or why there is nothing to check."""
    method = METHODS[name]
    if (reason := method.needs(base)) is not None:
        return {"outcome": "not applicable", "reason": reason}
    model = apply_method(copy.deepcopy(base), name)
    batch = Collator(0)(encode_all(tokenizer, EXAMPLES).items)
    checks = run_prechecks(model, base, tokenizer, method, batch, [example.prompt for example in EXAMPLES])
    red = [check for check in checks if check.passed is False]
    entry = {"outcome": "red" if red else "ok", "checks": {check.name: WORDS[check.passed] for check in checks}}
    if red:
        entry["reason"] = "; ".join(f"{check.name}: {check.detail}" for check in red)
    return entry


WORDS = {True: "ok", False: "red", None: "not applicable"}


@pytest.mark.parametrize("registered", METHODS)
def test_the_stored_matrix_is_what_the_checks_find(request, monkeypatch, family, registered, patched, tokenizer):
    monkeypatch.setattr(prechecks, "NEW_TOKENS", 3)  # as many show it, and take half the time
    found = probe(registered, patched, tokenizer)
    kind = patched.config.model_type
    stored = capabilities_page.read()
    if request.config.getoption("--write-models-md", default=False):
        stored["versions"] = {name: version(name).partition("+")[0] for name in ("transformers", "peft", "torch")}
        cells = stored["families"].get(kind, {}) | {registered: found}
        stored["families"][kind] = {name: cells[name] for name in METHODS if name in cells}
        capabilities_page.DATA.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        return
    expected = stored["families"].get(kind, {}).get(registered)
    assert _comparable(found) == _comparable(expected), (
        "run `pytest tests/families --write-models-md` and look at what has changed"
    )


def test_the_page_shows_the_stored_matrix(request):
    stored = capabilities_page.read()
    rendered = capabilities_page.render(stored, METHODS)
    if request.config.getoption("--write-models-md", default=False):
        capabilities_page.PAGE.write_text(rendered, encoding="utf-8")
    assert capabilities_page.PAGE.read_text(encoding="utf-8") == rendered


def _comparable(cell: dict | None) -> dict | None:
    """Without the reason of a red cell, whose numbers are of one machine."""
    return cell | {"reason": ""} if cell and cell["outcome"] == "red" else cell

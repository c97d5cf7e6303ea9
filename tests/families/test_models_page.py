"""docs/models.md says what the checks of test_conformance.py found, those that have run; this file runs after it."""

import models_page
import pytest

REMEDY = "run `pytest tests/families --write-models-md` and look at what has changed"


def test_the_page_is_what_the_checks_found(request, outcomes):
    if not outcomes.complete():
        page = models_page.PAGE.read_text(encoding="utf-8")
        assert outcomes.untrue(models_page.generated_part(page)) == [], REMEDY
        return
    assert outcomes.failed() == [], "the page waits until every check holds or is known not to"
    page = models_page.PAGE.read_text(encoding="utf-8")
    generated = outcomes.render()
    if request.config.getoption("--write-models-md", default=False):
        models_page.PAGE.write_text(models_page.with_generated_part(page, generated), encoding="utf-8")
        return
    expected = models_page.without_versions(generated)
    actual = models_page.without_versions(models_page.generated_part(page))
    assert actual == expected, REMEDY


@pytest.fixture
def small():
    """Outcomes of one family, two methods and two checks."""
    cells = {
        ("Mamba", "full", "creates"): ("passed", ""),
        ("Mamba", "full", "merges"): ("skipped", "there is nothing to merge"),
        ("Mamba", "LoRA", "creates"): ("passed", ""),
        ("Mamba", "LoRA", "merges"): ("known", "it does not"),
    }
    meanings = {"creates": "It is made.", "merges": "It merges."}
    return models_page.Outcomes(["Mamba"], ["full", "LoRA"], cells, meanings)


def test_render(small):
    generated = small.render()
    assert "|  | full | LoRA |\n|---|---|---|\n| Mamba | 1 of 1 | 1 of 2 |\n" in generated
    assert "### Mamba\n\n|  | full | LoRA |\n|---|---|---|\n| creates | ✓ | ✓ |\n| merges | –¹ | ✗² |\n" in generated
    assert generated.endswith("1. There is nothing to merge.\n2. It does not.\n")


def test_other_versions_with_the_same_outcomes_are_no_difference(small, monkeypatch):
    before = small.render()
    monkeypatch.setattr(models_page, "version", lambda name: "99.0")
    assert small.render() != before
    assert models_page.without_versions(small.render()) == models_page.without_versions(before)
    small.cells["Mamba", "full", "creates"] = ("known", "it is not")
    assert models_page.without_versions(small.render()) != models_page.without_versions(before)


def test_a_run_of_a_part_of_the_checks_is_told(small):
    assert small.complete()
    del small.cells["Mamba", "full", "merges"]
    assert not small.complete()
    assert not models_page.Outcomes(["Mamba"], ["full"]).complete()


def test_a_page_is_judged_by_the_checks_that_have_run(small):
    generated = small.render()
    assert small.untrue(generated) == []
    small.cells["Mamba", "full", "creates"] = ("known", "it is not")
    small.cells["Mamba", "LoRA", "merges"] = ("known", "it does not, for another reason")
    del small.cells["Mamba", "full", "merges"]
    assert small.untrue(generated) == [("Mamba", "full", "creates"), ("Mamba", "LoRA", "merges")]


def test_only_what_is_between_the_markers_is_replaced():
    page = f"above\n\n{models_page.BEGIN}\nold\n\n{models_page.END}\nbelow\n"
    written = models_page.with_generated_part(page, "new\n")
    assert models_page.generated_part(written) == "new\n"
    assert written == page.replace("old", "new")
    with pytest.raises(ValueError, match="lost one of its markers"):
        models_page.with_generated_part("above\n", "new\n")

from types import SimpleNamespace

import pytest

from benchmarks import probes
from benchmarks.probe_answers import answers, table
from ssmtune.report.studies import Study
from ssmtune.summary import MethodRow, Spread
from ssmtune.tasks import load_task
from ssmtune.tasks.probes import PROBES


def study(name, **tasks):
    """A comparison whose scores are given: study("llama", probe_copy={"full": [99, 100]})."""
    kinds = {"full": "full", "lora": "weights", "prefix-tuning": "prompt", "initial-state": "state"}
    summaries = []
    for task, scores in tasks.items():
        rows = [MethodRow("base", "Base", "base", scores=Spread((0.0,)))]
        rows += [MethodRow(m, m.title(), kinds[m], scores=Spread(tuple(values))) for m, values in scores.items()]
        summaries.append(SimpleNamespace(name=task.replace("_", "-"), rows=rows))
    return Study(name, SimpleNamespace(tasks=summaries))


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_models_are_small_and_take_each_word_for_a_token(family):
    model, tokenizer = probes.new_model(family)
    assert 120_000 < sum(parameter.numel() for parameter in model.parameters()) < 140_000
    for name in PROBES:
        for example in load_task(name).test[:20]:
            text = example.prompt + example.target
            tokens = tokenizer(text)["input_ids"]
            assert len(tokens) == len(text.split()) and tokenizer.eos_token_id not in tokens
            assert tokenizer.decode(tokens) == text


def grouped(name, task, **scores):
    """A comparison of full fine-tuning on a task whose scores are those of groups of its examples."""
    others = {f"exact_match_{group}": Spread(tuple(values)) for group, values in scores.items()}
    row = MethodRow("full", "Full", "full", scores=Spread((50.0,)), others=others)
    return Study(name, SimpleNamespace(tasks=[SimpleNamespace(name=task, rows=[row])]))


def test_answers_read_the_many_pairs_and_the_few_and_many_swaps():
    recall = answers([grouped("llama", "probe-recall", **{"3_pairs": [100], "10_pairs": [40]})])
    assert [(answer.measured, answer.holds) for answer in recall] == [("40.0 (1)", False)]
    swaps = answers([grouped("mamba", "probe-swaps", **{"2_swaps": [91], "4_swaps": [50], "16_swaps": [11]})])
    assert [(answer.measured, answer.holds) for answer in swaps] == [("91.0 (1)", True), ("11.0 (1)", False)]


def test_answers_compare_what_was_measured_with_what_is_known():
    held = answers(
        [
            study("llama", probe_copy={"full": [99, 100]}),
            study("mamba", probe_copy={"full": [40, 98]}),
            study("llama-sorter", probe_order={"full": [95], "lora": [30], "prefix-tuning": [3]}),
            study("mamba-sorter", probe_order={"full": [80], "initial-state": [12]}),
        ]
    )
    came_out = {answer.claim: answer.holds for answer in held}
    assert came_out == {
        "probe-copy: llama learns it": True,
        "probe-copy: mamba is behind it at the same steps": True,
        "probe-order: Full teaches it to llama-sorter": True,
        "probe-order: Prefix-Tuning does not teach it to llama-sorter": True,
        "probe-order: Full teaches it to mamba-sorter": False,
        "probe-order: Initial-State does not teach it to mamba-sorter": False,
    }
    assert "| 69.0 ± 41.0 (2) | yes |" in table(held) and table(held).count("**no**") == 2
    overlapping = [study("llama", probe_copy={"full": [99, 97]}), study("mamba", probe_copy={"full": [40, 98]})]
    assert [answer.holds for answer in answers(overlapping)] == [True, False]


@pytest.mark.slow
def test_probes_tell_a_prompt_from_full_fine_tuning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "METHODS", {"llama": ["full", "prompt-tuning"]})
    assert probes.main(["--out", str(tmp_path), "--parts", "llama-changes", "--seeds", "1"]) == 0
    text = (tmp_path / "answers.md").read_text()
    assert text.count("| yes |") == 4 and text in capsys.readouterr().out and (tmp_path / "report.html").is_file()

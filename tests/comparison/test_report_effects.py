import dataclasses
import json

import numpy as np
import pytest

from ssmtune.ranks import average_ranks
from ssmtune.report import write_report
from ssmtune.report.notes import ranking
from ssmtune.summary import summarize
from ssmtune.tasks.terms import mean_terms


@pytest.fixture
def measured(fake):
    """A made-up comparison whose runs have effects and terms; in that of `full` the perplexity has overflown."""
    out = fake({"lora": [50, 52], "full": [75, 77]}, base=25.0)
    for file in (out / "cells" / "final").iterdir():
        record = json.loads(file.read_text())
        seed, full = record["cell"]["seed"], record["cell"]["method"] == "full"
        record["terms"] = mean_terms(np.tile([100, 100, 100, 0] if full else [100, 0, 100, 0], 64)).packed()
        record["effects"] = {
            "forgetting": {"nats_per_token": 0.5 + seed / 10, "perplexity": 9.0, "base_perplexity": 5.0},
            "length": {"training_length": 128, "perplexity": {"1x": 30.0, "2x": 29.0, "4x": None if full else 31.0}},
            "ood": {name: {"auroc": 90.0 + seed, "fpr95": 20.0} for name in ("softmax", "energy")},
            "switching": {"ms": 0.25, "how": "set_adapter"},
        }
        file.write_text(json.dumps(record))
    return out


def test_effects_are_columns(measured):
    lines = write_report(measured).markdown.read_text().splitlines()
    header = next(line for line in lines if line.startswith("| method |")).strip("| ").split(" | ")
    rows = {}
    for line in lines:
        if line.startswith("| ") and len(cells := line.strip("|").split("|")) == len(header):
            rows[cells[0].strip(" *")] = dict(zip(header, map(str.strip, cells), strict=True))
    lora = rows["LORA"]
    assert lora["forgetting"] == "0.550 ± 0.071" and lora["switch ms"] == "0.25" and lora["step ms"] == "40.0"
    assert (lora["ppl 1x"], lora["ppl 2x"], lora["ppl 4x"]) == ("30.0 ± 0.0", "29.0 ± 0.0", "31.0 ± 0.0")
    assert lora["AUROC softmax"] == "90.5 ± 0.7" and lora["FPR95 energy"] == "20.0 ± 0.0"
    assert lora["× base"] == "1.25" and rows["Base model, not tuned"]["× base"] == "1.00"
    assert rows["FULL"]["ppl 4x"] == "inf" and rows["Base model, not tuned"]["forgetting"] == ""
    assert rows["FULL"]["vs LORA, bootstrap"].startswith("+25.0 [") and lora["vs LORA, bootstrap"] == ""


def test_pairs_that_differ_are_listed(measured):
    report = write_report(measured)
    text = report.markdown.read_text()
    listed = text.split("below 0.05:\n\n")[1].splitlines()[0]
    assert listed.startswith("- FULL and LORA: +25.0 [") and listed.endswith("p = 0.001")
    assert "FULL and LORA: +25.0" in report.html.read_text()


def test_ranks_are_a_sentence(measured):
    summary = summarize(measured)
    assert ranking(summary) is None
    scores = {f"task {i}": {"full": 1.0, "lora": 0.0} for i in range(5)}
    few = dataclasses.replace(summary, ranks=average_ranks(dict(list(scores.items())[:2])))
    assert ranking(few).startswith(
        "Average rank over 2 tasks, 1 is best: FULL 1.00, LORA 2.00. These are too few tasks"
    )
    enough = dataclasses.replace(summary, ranks=average_ranks(scores))
    assert "less than 0.88 are not told apart (Nemenyi, 5 %)" in ranking(enough)

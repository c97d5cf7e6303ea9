import subprocess
import sys
from pathlib import Path

import pytest

from ssmtune.tasks.text_metrics import ROUGE_TYPES, corpus_bleu, rouge

HYPOTHESES = ["A pub by the river called The Mill.", "Zizzi serves cheap food.", "It is Wildwood, a good pub."]
REFERENCES = [
    ("The Mill is a pub by the river.", "By the river is The Mill, a pub."),
    ("Zizzi serves cheap Italian food.",),
    ("Wildwood is a good pub.", "A good pub is Wildwood.", "It is Wildwood, a pub."),
]


def test_corpus_bleu_is_what_sacrebleu_prints(tmp_path):
    # Missing references are empty lines in the files that the command line tool takes.
    (tmp_path / "hyp").write_text("\n".join(HYPOTHESES) + "\n")
    names = []
    for k in range(3):
        names.append(str(tmp_path / f"ref{k}"))
        Path(names[-1]).write_text("\n".join(row[k] if k < len(row) else "" for row in REFERENCES) + "\n")
    said = subprocess.run(
        [sys.executable, "-m", "sacrebleu", *names, "-i", str(tmp_path / "hyp"), "-b", "-w", "6"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert corpus_bleu(HYPOTHESES, REFERENCES) == pytest.approx(float(said), abs=1e-6)


@pytest.mark.parametrize("kind", ROUGE_TYPES)
def test_rouge_is_the_best_of_the_references_by_rouge_score(kind):
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([ROUGE_TYPES[kind]])
    best = [
        max(scorer.score(reference, text)[ROUGE_TYPES[kind]].fmeasure for reference in row)
        for text, row in zip(HYPOTHESES, REFERENCES, strict=True)
    ]
    assert rouge(HYPOTHESES, REFERENCES, (kind,)) == {kind: pytest.approx(100 * sum(best) / 3)}


def test_rouge_is_what_the_program_of_rouge_score_writes(tmp_path):
    """Its csv has the mean over the lines of two files, with one reference each."""
    (tmp_path / "targets").write_text("\n".join(row[0] for row in REFERENCES) + "\n")
    (tmp_path / "predictions").write_text("\n".join(HYPOTHESES) + "\n")
    out = tmp_path / "scores.csv"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "rouge_score.rouge",
            f"--target_filepattern={tmp_path / 'targets'}",
            f"--prediction_filepattern={tmp_path / 'predictions'}",
            f"--output_filename={out}",
            "--rouge_types=rouge1,rouge2,rougeL",
            "--noaggregate",
        ],
        check=True,
        capture_output=True,
    )
    header, *lines = [line.split(",") for line in out.read_text().split()]
    ours = rouge(HYPOTHESES, [row[:1] for row in REFERENCES], tuple(ROUGE_TYPES))
    for kind, name in ROUGE_TYPES.items():
        column = header.index(f"{name}-F")
        mean = sum(float(line[column]) for line in lines) / len(lines)
        assert ours[kind] == pytest.approx(100 * mean, abs=1e-4)

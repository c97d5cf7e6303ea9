import pytest

from ssmtune.config import ConfigError
from ssmtune.tasks import load_task
from ssmtune.tasks.glue import GLUE

PAIR_HEADER = "index\tsentence1\tsentence2\tlabel"
MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    "\tsentence1\tsentence2\tlabel1\tgold_label"
)


def mnli_row(label):
    return f"0\t1\t1n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt is wet.\tIt rained.\t{label}\t{label}"


# header (or none) and rows of each file's format: two rows of the train file, and those of the dev files
FILES = {
    "sst2": ("sentence\tlabel", ["a fine \" film \t1", "a dull film \t0"]),
    "cola": (None, ["gj04\t1\t\tThey sailed.", "gj04\t0\t*\tSailed they the."]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t12\t13\tHe came .\tHe arrived .",
                                                                  "0\t1\t2\tHe came .\tShe left ."]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t3\t4\tWhy?\tWhat for?\t1",
                                                                  "2\t5\t6\tWhy?\tWho?\t0"]),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             ["0\tnews\tf\t2012\t1\tnone\tnone\tA dog.\tA hound.\t4.750",
              "1\tnews\tf\t2012\t2\tnone\tnone\tA dog.\tA car.\t0.000"]),
    "mnli": (MNLI_HEADER, [mnli_row("neutral"), mnli_row("contradiction")]),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\tWho?\tShe did.\tentailment", "1\tWho?\tYes.\tnot_entailment"]),
    "rte": (PAIR_HEADER, ["0\tIt rains.\tIt is wet.\tentailment", "1\tIt rains.\tIt is dry.\tnot_entailment"]),
    "wnli": (PAIR_HEADER, ["0\tHe fell on it.\tHe fell on ice.\t1", "1\tHe fell on it.\tHe fell on him.\t0"]),
}  # fmt: skip
ANSWERS = {
    "sst2": {"positive", "negative"}, "stsb": {"4.8", "0.0"}, "mnli": {"maybe", "no"},
}  # fmt: skip


def write(folder, name, rows=None):
    header, known = FILES[name]
    folder = folder / GLUE[name].folder
    folder.mkdir(parents=True)
    lines = [header] * (header is not None) + (known if rows is None else rows)
    for file in ("train.tsv", *(file for file, _, _ in GLUE[name].tests)):
        (folder / file).write_bytes(("\n".join(lines) + "\n").encode())
    return folder


@pytest.mark.parametrize("name", GLUE)
def test_load_reads_the_official_format(name, tmp_path):
    folder = write(tmp_path / "glue_data", name)
    task = load_task(name, tmp_path)
    assert task == load_task(name, tmp_path / "glue_data") == load_task(name, folder)
    assert task.sizes() == {"train": 1, "dev": 1, "test": 2 * len(GLUE[name].tests)}
    assert {example.target.strip() for example in task.test} == ANSWERS.get(name, {"yes", "no"})
    assert {example.prompt for example in task.train + task.dev} <= {example.prompt for example in task.test}
    perfect = task.score([example.target.strip() for example in task.test], task.test)
    assert list(perfect)[: len(GLUE[name].metrics)] == list(GLUE[name].metrics)
    assert perfect.pop("invalid") == 0 and min(perfect.values()) == pytest.approx(100)


def test_load_keeps_a_quote_and_drops_a_byte_order_mark(tmp_path):
    write(tmp_path, "sst2")
    write(tmp_path, "mrpc")
    assert load_task("sst2", tmp_path).test[0].prompt == 'Review: a fine " film\nPositive or negative?'
    assert load_task("mrpc", tmp_path).test[0].prompt.startswith("First: He came .\nSecond: He arrived .\n")


def test_mnli_is_scored_matched_and_mismatched_apart(tmp_path):
    write(tmp_path, "mnli")
    task = load_task("mnli", tmp_path)
    assert task.score(["maybe", "no", "maybe", "yes"], task.test) == {
        "accuracy": 75.0,
        "accuracy_matched": 100.0,
        "accuracy_mismatched": 50.0,
        "invalid": 0.0,
    }


def test_stsb_keeps_the_exact_score_beside_the_rounded_one(tmp_path):
    write(tmp_path, "stsb")
    example = load_task("stsb", tmp_path).test[0]
    assert (example.target, example.references) == (" 4.8", ("4.75",))


def test_qqp_skips_the_broken_rows_of_the_release(tmp_path):
    write(tmp_path, "qqp", [*FILES["qqp"][1], "3\t7\t8\tHow do I", "4\t9\t10\tWho?\tWhich one?\t1"])
    assert len(load_task("qqp", tmp_path).test) == 3


@pytest.mark.parametrize(
    "name, rows, said",
    [
        ("sst2", ["a film\t1", "a film\t2"], r"dev\.tsv: line 3 has the label '2'.*labels of SST-2: 0, 1"),
        ("rte", ["0\tIt rains.\tentailment"], r"train\.tsv: line 2 has 3 fields, expected 4.*index, sentence1"),
        ("cola", ["gj04\t1\tThey sailed."], r"train\.tsv: line 1 has 3 fields, expected 4"),
        (
            "stsb",
            [FILES["stsb"][1][0].replace("4.750", "5.5")],
            r"train\.tsv: line 2 has the score '5\.5'.*from 0 to 5",
        ),
        ("stsb", [FILES["stsb"][1][0].replace("4.750", "high")], r"line 2 has the score 'high'"),
    ],
)
def test_a_broken_row_is_named_with_its_line(name, rows, said, tmp_path):
    folder = write(tmp_path, name)
    header = [FILES[name][0]] * (FILES[name][0] is not None)
    file = "dev.tsv" if "dev" in said else "train.tsv"
    (folder / file).write_text("\n".join([*header, *rows]) + "\n")
    with pytest.raises(ValueError, match=f"(?s){said}.*\n  Get the file again"):
        load_task(name, tmp_path)


def test_a_file_without_rows_is_named(tmp_path):
    file = write(tmp_path, "rte") / "train.tsv"
    for text in ("", FILES["rte"][0], FILES["rte"][0] + "\n\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"(?s)train\.tsv has no rows.*nothing to learn from"):
            load_task("rte", tmp_path)


def test_other_separators_of_lines_are_part_of_a_text(tmp_path):
    folder = write(tmp_path, "rte", ["0\tIt\u2028ra\x85ins.\tIt is\rwet.\tentailment\r", "", *FILES["rte"][1]])
    assert [example.target for example in load_task("rte", tmp_path).test] == [" yes", " yes", " no"]
    (folder / "dev.tsv").write_bytes(f"{PAIR_HEADER}\n0\tcaf".encode() + b"\xe9\tx\tentailment\n")
    with pytest.raises(ValueError, match=r"(?s)dev\.tsv: line 2 is not text in UTF-8.*released in UTF-8"):
        load_task("rte", tmp_path)


def test_a_missing_column_is_named_with_those_there(tmp_path):
    folder = write(tmp_path, "wnli")
    (folder / "dev.tsv").write_text("index\tsentence1\tsentence2\n0\tHe fell on it.\tHe fell on ice.\n")
    with pytest.raises(
        ValueError, match=r"(?s)dev\.tsv: line 1 has no column 'label'.*columns: index, sentence1, sent"
    ):
        load_task("wnli", tmp_path)


def test_missing_files_are_named(tmp_path):
    (write(tmp_path, "mnli") / "dev_mismatched.tsv").unlink()
    with pytest.raises(
        ConfigError, match=r"(?s)task mnli: .* lacks dev_mismatched\.tsv\..*MNLI, glue/MNLI.*released at"
    ):
        load_task("mnli", tmp_path)
    with pytest.raises(
        ConfigError, match=r"(?s)no --data-dir was given.*train\.tsv, dev\.tsv, or nyu-mll/glue to load"
    ):
        load_task("sst2")
    with pytest.raises(ConfigError, match="does not exist"):
        load_task("sst2", tmp_path / "nowhere")


def test_load_from_the_hub_gives_the_same(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, subset, split, revision):
        asked.append((path, subset, split))
        rows = {"premise": ["It is wet."] * 2, "hypothesis": ["It rained."] * 2, "label": [1, 2], "idx": [0, 1]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write(tmp_path, "mnli")
    assert load_task("mnli", "nyu-mll/glue") == load_task("mnli", tmp_path)
    splits = ["train", "validation_matched", "validation_mismatched"]
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits]


@pytest.mark.parametrize(
    "name, official, test",
    [("sst2", 67349, 872), ("rte", 2490, 277), ("stsb", 5749, 1500), ("wnli", 635, 71), ("mrpc", None, 408)],
)
def test_load_reads_the_official_release(name, official, test, released):
    task = load_task(name, released)
    sizes = task.sizes()
    assert sizes["test"] == test
    if official is not None:
        assert sizes["train"] + sizes["dev"] == official
    assert sizes["dev"] == min(1000, round(0.1 * (sizes["train"] + sizes["dev"])))
    perfect = task.score([example.target.strip() for example in task.test], task.test)
    # the targets of STS-B are rounded to a tenth
    assert perfect[task.metric] > 99.9 and perfect["invalid"] == 0


def test_qnli_dev_has_the_published_size(released):
    from ssmtune.tasks.glue import _rows_of_file

    rows = list(_rows_of_file(GLUE["qnli"], released / "glue" / "QNLI" / "dev.tsv"))
    assert len(rows) == 5463 and {label for _, _, label in rows} == {"entailment", "not_entailment"}

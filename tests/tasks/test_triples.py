import json

import pytest

from ssmtune.tasks import load_task
from ssmtune.tasks.dart import read
from ssmtune.tasks.triples import prompt

XML = """<?xml version="1.0" encoding="utf-8"?>
<benchmark>
  <entries>
    <entry category="{category}" eid="Id1" size="2">
      <originaltripleset>
        <otriple>The_Mill | locatedIn | Riverside</otriple>
      </originaltripleset>
      <modifiedtripleset>
        <mtriple>The_Mill | location | Riverside</mtriple>
        <mtriple>The_Mill | "food" | Fish &amp; Chips</mtriple>
      </modifiedtripleset>
      <lex comment="good" lid="Id1">The Mill in Riverside
        serves fish &amp; chips.</lex>
      <lex comment="good" lid="Id2">Fish &amp; chips are served at The Mill.</lex>
      <lex comment="good" lid="Id3"></lex>
    </entry>
  </entries>
</benchmark>
"""
DART = [
    {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "Colleges"]],
        "subtree_was_extended": False,
        "annotations": [
            {"source": "WikiSQL_decl_sents", "text": "Mars Hill joined in 1973."},
            {"source": "WikiSQL_lily", "text": "In 1973 Mars Hill joined."},
        ],
    }
]


@pytest.fixture
def webnlg(tmp_path):
    folder = tmp_path / "webnlg_challenge_2017"
    for path, category in (
        ("train/2triples/2triples_Food_train_challenge.xml", "Food"),
        ("dev/2triples/2triples_Food_dev_challenge.xml", "Food"),
        ("test/testdata_with_lex.xml", "Food"),
        ("test/testdata_unseen_with_lex.xml", "Artist"),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(XML.format(category=category))
    test = folder / "test" / "testdata_with_lex.xml"
    unseen = XML.format(category="Artist").partition("<entries>")[2].partition("</entries>")[0].replace("Mill", "Weir")
    test.write_text(test.read_text().replace("</entries>", f"{unseen}</entries>"))
    return folder


@pytest.fixture
def dart(tmp_path):
    folder = tmp_path / "dart" / "data" / "v1.1.1"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"dart-v1.1.1-full-{split}.json").write_text(json.dumps(DART, indent=2))
    (folder / "dart-v1.1.1-full-test.xml").write_text(XML.format(category="MISC"))
    return folder


def test_prompt_has_every_triple():
    said = prompt([("The_Mill", "location", "Riverside"), ("The_Mill", "food", "Fish")])
    assert said == "Facts: The Mill | location | Riverside; The Mill | food | Fish. In words:"


def test_webnlg_learns_from_each_text_and_measures_against_all(webnlg):
    task = load_task("webnlg", webnlg)
    assert task == load_task("webnlg", webnlg.parent)
    assert task.sizes() == {"train": 2, "dev": 1, "test": 2}
    texts = ("The Mill in Riverside serves fish & chips.", "Fish & chips are served at The Mill.")
    assert [example.target for example in task.train] == [f" {text}" for text in texts]
    assert task.dev[0].references == texts
    assert [example.group for example in task.test] == ["seen", "unseen"]


def test_webnlg_scores_seen_and_unseen_categories_apart(webnlg):
    task = load_task("webnlg", webnlg)
    scores = task.score([task.test[0].references[1], "Nothing at all is said here."], task.test)
    assert scores["bleu_seen"] == pytest.approx(100) and scores["bleu_unseen"] < 10
    assert scores["bleu_unseen"] < scores["bleu"] < 100
    assert set(scores) == {"bleu", "rouge_l", "bleu_seen", "rouge_l_seen", "bleu_unseen", "rouge_l_unseen"}


def test_dart_reads_json_and_xml(dart):
    task = load_task("dart", dart)
    assert task == load_task("dart", dart.parents[2])
    assert task.sizes() == {"train": 2, "dev": 1, "test": 1}
    assert task.dev[0].prompt == "Facts: Mars Hill | JOINED | 1973; [TABLECONTEXT] | [TITLE] | Colleges. In words:"
    assert task.dev[0].references == ("Mars Hill joined in 1973.", "In 1973 Mars Hill joined.")
    assert task.test[0].references[1] == "Fish & chips are served at The Mill."
    assert set(task.score(["a", "b"][:1], task.test)) == {"bleu", "rouge_l"}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("</benchmark>", "", r"line 19 is not valid XML \(no element found"),
        ("<lex ", "<lex< ", r"line 12 is not valid XML"),
        (
            " | Riverside</m",
            "</m",
            r"entry 1 \(Food Id1\) has a triple of 2 parts.*a subject, a relation and an object",
        ),
        ("entry ", "entity ", "line 16 is not valid XML"),
        ("mtriple>", "triple>", r"entry 1 \(Food Id1\) has no triples"),
    ],
)
def test_broken_xml_is_named_with_its_place(webnlg, old, new, said):
    file = webnlg / "dev" / "2triples" / "2triples_Food_dev_challenge.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"(?s)2triples_Food_dev_challenge\.xml: {said}.*\n  Get the file again"):
        load_task("webnlg", webnlg)


@pytest.mark.parametrize(
    "text, said",
    [
        (json.dumps(DART, indent=1)[:-2], r"line 26 is not valid JSON"),
        ('{"tripleset": []}', "is of type dict, expected a list"),
        ('[{"tripleset": [["a", "b", "c"]]}]', r"entry 1 is no entry of DART \(KeyError: 'annotations'\)"),
        ('[{"tripleset": [["a", "b"]], "annotations": []}]', "entry 1 has a triple of 2 parts"),
        ("[]", "has no entries"),
        ("[7]", "entry 1 is of type int, expected an object"),
    ],
)
def test_broken_json_is_named_with_its_place(dart, text, said):
    file = dart / "dart-v1.1.1-full-dev.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)full-dev\.json: {said}|full-dev\.json {said}"):
        load_task("dart", dart)


def test_xml_without_entries_is_named(webnlg):
    (webnlg / "test" / "testdata_with_lex.xml").write_text("<benchmark><entries/></benchmark>")
    with pytest.raises(ValueError, match=r"testdata_with_lex\.xml has no entries"):
        load_task("webnlg", webnlg)


def test_a_folder_without_xml_is_named(webnlg):
    for file in (webnlg / "dev").rglob("*.xml"):
        file.unlink()
    with pytest.raises(ValueError, match=r"dev holds no \.xml file"):
        load_task("webnlg", webnlg)


def test_load_from_the_hub_gives_the_same(webnlg, dart, monkeypatch):
    datasets = pytest.importorskip("datasets")
    triples = [["The_Mill | location | Riverside", 'The_Mill | "food" | Fish & Chips']]
    texts = ["The Mill in Riverside serves fish & chips.", "Fish & chips are served at The Mill.", ""]

    def load_dataset(path, subset, split, revision):
        assert revision == "refs/convert/parquet"
        if path == "Yale-LILY/dart":
            known = {"source": [["a", "b"]], "text": [[note["text"] for note in DART[0]["annotations"]]]}
            columns = {"tripleset": [DART[0]["tripleset"]]}
            columns["annotations"] = [{"source": known["source"][0], "text": known["text"][0]}]
            return datasets.Dataset.from_dict(columns)
        assert subset == "webnlg_challenge_2017"
        row = {"category": "Food", "modified_triple_sets": {"mtriple_set": triples}, "lex": {"text": texts}}
        rows = [row | {"test_category": "testdata_no_lex" if split == "test" else ""}]
        if split == "test":
            again = json.loads(json.dumps(row).replace("Mill", "Weir"))
            rows += [row | {"test_category": "testdata_with_lex"}]
            rows += [again | {"category": "Artist", "test_category": "testdata_with_lex"}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("webnlg", "webnlg-challenge/web_nlg@refs/convert/parquet") == load_task("webnlg", webnlg)
    hub, files = load_task("dart", "Yale-LILY/dart@refs/convert/parquet"), load_task("dart", dart)
    assert (hub.train, hub.dev) == (files.train, files.dev)


def test_webnlg_reads_the_official_release(released):
    task = load_task("webnlg", released)
    assert task.sizes() == {"train": 18102, "dev": 872, "test": 1862}
    assert sum(len(example.references) for example in task.dev) == 2268
    assert sum(len(example.references) for example in task.test) == 4928
    # as in the report of the challenge
    assert [sum(example.group == group for example in task.test) for group in ("seen", "unseen")] == [971, 891]


@pytest.mark.parametrize("file, entries, texts", [("dev.json", 2768, 6980), ("test.xml", 5097, 12552)])
def test_dart_files_have_the_published_sizes(file, entries, texts, released):
    found = read(released / "dart" / f"dart-v1.1.1-full-{file}")
    # one text of the test set is empty
    assert len(found) == entries and sum(len(entry.texts) for entry in found) == texts - (file == "test.xml")

import json

import pytest

from ssmtune.tasks import load_task
from ssmtune.tasks.text_metrics import rouge

CHATS = [
    {"id": "1", "summary": "Amanda baked cookies.\r\nJerry gets some.", "dialogue": "Amanda: Cookies?\r\nJerry: Sure!"},
    {"id": "2", "summary": "Olivia votes.", "dialogue": ""},
]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.json").write_text(json.dumps(CHATS, indent=2))
    return folder


def test_samsum_is_a_chat_and_its_summary_on_one_line(corpus):
    task = load_task("samsum", corpus)
    assert task == load_task("samsum", corpus.parent)
    assert task.sizes() == {"train": 2, "dev": 2, "test": 2}
    assert task.dev[0].prompt == "Amanda: Cookies?\nJerry: Sure!\nIn short:"
    assert task.dev[0].target == " Amanda baked cookies. Jerry gets some."


def test_samsum_is_scored_by_three_kinds_of_rouge(corpus):
    task = load_task("samsum", corpus)
    texts = ["Amanda baked for Jerry.", "Olivia votes."]
    expected = rouge(texts, [example.references for example in task.test], ("rouge_1", "rouge_2", "rouge_l"))
    assert task.score(texts, task.test) == expected and task.metric == "rouge_1"
    assert expected["rouge_1"] > expected["rouge_2"] > 50


def test_broken_files_are_named_with_their_place(corpus):
    (corpus / "val.json").write_text(json.dumps(CHATS, indent=2).replace('"dialogue": ""', '"dialog": ""'))
    with pytest.raises(ValueError, match=r"(?s)val\.json: entry 2 lacks a dialogue or a summary.*id, summary, dialog"):
        load_task("samsum", corpus)
    (corpus / "val.json").write_text(json.dumps(CHATS, indent=2).replace('"id": "2",', '"id": "2"'))
    with pytest.raises(ValueError, match=r"val\.json: line 9 is not valid JSON \(Expecting ',' delimiter"):
        load_task("samsum", corpus)


def test_load_from_the_hub_gives_the_same(corpus, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(CHATS))
    assert load_task("samsum", "knkarthick/samsum") == load_task("samsum", corpus)

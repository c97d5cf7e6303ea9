import csv
import zipfile

import pytest

from ssmtune.tasks import load_task
from ssmtune.tasks.e2e import FILES, prompt

ROWS = {
    "train": [("name[The Mill], area[riverside]", "The Mill is by the river."), ("name[The Mill]", "Try The  Mill.")],
    "dev": [("name[Zizzi]", "Zizzi exists."), ("name[Zizzi]", "There is Zizzi."), ("name[Aromi]", "Aromi, a place.")],
    "test": [("name[Wildwood]", "Wildwood it is."), ("name[Wildwood]", "Go to Wildwood.")],
}


@pytest.fixture
def folder(tmp_path):
    for split, rows in ROWS.items():
        with (tmp_path / FILES[split]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("MR", "ref") if split == "test" else ("mr", "ref"))
            writer.writerows(rows)
    return tmp_path


def test_e2e_pairs_train_and_groups_the_rest(folder):
    task = load_task("e2e", folder)
    assert task.sizes() == {"train": 2, "dev": 2, "test": 1}
    assert task.train[0].prompt == "Facts: name is The Mill; area is riverside. In words:"
    assert task.train[1].target == " Try The Mill."
    assert task.dev[0].references == ("Zizzi exists.", "There is Zizzi.")


def test_e2e_reads_the_release_zip_and_a_folder_above(folder, tmp_path_factory):
    above = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(above / "e2e-dataset.zip", "w") as archive:
        for name in FILES.values():
            archive.write(folder / name, f"e2e-dataset/{name}")
    expected = load_task("e2e", folder)
    assert load_task("e2e", above / "e2e-dataset.zip") == expected == load_task("e2e", above)
    assert load_task("e2e", folder.parent / folder.name) == expected


def test_e2e_names_what_is_missing(folder, tmp_path):
    (folder / "devset.csv").unlink()
    with pytest.raises(ValueError, match=r"lacks devset\.csv"):
        load_task("e2e", folder)
    with pytest.raises(ValueError, match="no --data-dir was given"):
        load_task("e2e")
    with pytest.raises(ValueError, match="does not exist"):
        load_task("e2e", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a folder"):
        load_task("e2e", folder / "trainset.csv")


@pytest.mark.parametrize(
    "text, said",
    [
        ("mr,text\nname[Zizzi],There is Zizzi.\n", r"line 2 lacks the column mr or ref.*Its columns: mr, text"),
        ("mr,ref\nname[Zizzi]\n", "line 2 has not 2 fields"),
        ('mr,ref\nname[Zizzi],"There is\n', "line 2 cannot be read"),
    ],
)
def test_e2e_names_the_broken_line(folder, text, said):
    (folder / "devset.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)devset\.csv: {said}"):
        load_task("e2e", folder)


def test_prompt_names_every_slot():
    said = prompt("name[A, b], customer rating[5 out of 5]")
    assert said == "Facts: name is A, b; customer rating is 5 out of 5. In words:"


def test_evaluate_compares_one_line_with_all_references(folder, monkeypatch):
    task = load_task("e2e", folder)
    said = {"name is Zizzi": " There is Zizzi.\nFacts: more", "name is Aromi": " Aromi, a place."}
    monkeypatch.setattr(
        "ssmtune.generation.generate_texts",
        lambda model, tokenizer, prompts, **options: [said[p.split(". ")[0].removeprefix("Facts: ")] for p in prompts],
    )
    assert task.evaluate(None, None, task.dev) == {"bleu": pytest.approx(100), "rouge_l": pytest.approx(100)}


def test_e2e_reads_the_official_release(released):
    task = load_task("e2e", released)
    assert task.sizes() == {"train": 42061, "dev": 547, "test": 630}
    assert sum(len(example.references) for example in task.test) == 4693
    assert all("[" not in example.prompt for example in task.test)

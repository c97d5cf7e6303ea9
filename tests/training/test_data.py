import json
import sys

import pytest

from ssmtune.data import IGNORED, Collator, Encoded, Example, encode, encode_all, encode_prompt, hold_out, load_examples


class Characters:
    """A tokenizer with one token for each character."""

    eos_token_id = 0
    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        if isinstance(text, list):
            return {"input_ids": [[ord(letter) for letter in one] for one in text]}
        return {"input_ids": [ord(letter) for letter in text]}


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", '{"word":"sea","meaning":"water, \\"salt\\"","n":3}\n\n{"word":"sun","meaning":"star","n":1}\n'),
        ("a.csv", '\ufeffword,meaning,n\nsea,"water, ""salt""",3\nsun,star,1\n'),
        ("a.tsv", 'word\tmeaning\tn\nsea\t"water, ""salt"""\t3\nsun\tstar\t1\n'),
    ],
)
def test_local_files_give_the_same_examples(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert load_examples(path, "{{{n}}} {word} means", "meaning") == [
        Example("{3} sea means", ' water, "salt"'),
        Example("{1} sun means", " star"),
    ]
    assert len(load_examples(path, "{word}", "meaning", limit=1)) == 1


def test_the_space_is_added_only_where_there_is_none(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a\n", "completion": "b"}) + "\n")
    assert load_examples(path) == [Example("a\n", "b")]
    assert load_examples(path, "", "{prompt}{completion}") == [Example("", "a\nb")]


def test_columns_are_not_looked_into(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(ValueError, match="has no column 'prompt.__class__'"):
        load_examples(path, "{prompt.__class__}")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "holds no examples"),
        ("a.csv", "word,meaning\n", "holds no examples"),
        ("a.jsonl", '{"word": "a", "meaning": "b"}\n{"word": \n', "line 2 is not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1 holds a list"),
        ("a.jsonl", '{"word": "a", "meanin": "b"}\n', "line 1 has no column 'meaning'; did you mean 'meanin'"),
        ("a.jsonl", '{"word": "a", "meaning": null}\n', "line 1 has an empty target"),
        ("a.csv", "word,meaning\na\n", "line 2 has not 2 fields as its header"),
        ("a.csv", "word,meaning\na,b,c\n", "line 2 has not 2 fields as its header"),
        ("a.csv", 'word,meaning\na,"b\n', "line 2 cannot be read"),
        ("a.parquet", "x", "cannot read .parquet"),
    ],
)
def test_broken_files_are_explained(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(write(tmp_path, name, text), "{word}", "meaning")
    assert 2 <= len(str(caught.value).splitlines()) <= 4


def test_missing_columns_are_answered_with_those_there_are(tmp_path):
    path = write(tmp_path, "a.csv", "word,meaning\na,b\n")
    with pytest.raises(ValueError, match="Its columns: word, meaning"):
        load_examples(path)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "poems.jsonl", "")
    with pytest.raises(ValueError, match="did you mean 'poems.jsonl'"):
        load_examples(tmp_path / "poem.jsonl")
    with pytest.raises(ValueError, match="is a directory"):
        load_examples(tmp_path)


def test_binary_file_is_explained(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        load_examples(path)


def test_broken_template_is_explained(tmp_path):
    with pytest.raises(ValueError, match="data.template '{word' cannot be read"):
        load_examples(write(tmp_path, "a.jsonl", "{}\n"), "{word")


def test_hub_name_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_examples("someone/poems")


def test_encode_puts_the_loss_on_the_target_and_ends_it():
    item = encode(Characters(), Example("ab", "c"))
    assert item == Encoded([97, 98, 99, 0], [IGNORED, IGNORED, 99, 0])
    assert encode(Characters(), Example("ab", "c"), add_eos=False).input_ids == [97, 98, 99]


def test_encode_cuts_the_prompt_first_and_counts():
    item = encode(Characters(), Example("abcdef", "xy"), 5)
    assert item == Encoded([101, 102, 120, 121, 0], [IGNORED, IGNORED, 120, 121, 0], prompt_cut=4)
    item = encode(Characters(), Example("ab", "uvwxyz"), 4)
    assert item == Encoded([98, 117, 118, 119], [IGNORED, 117, 118, 119], prompt_cut=1, target_cut=4)
    report = encode_all(Characters(), [Example("ab", "uvwxyz"), Example("a", "b")], 4).cut_report(4)
    assert report == "max_length=4 cut the beginning of 1 prompts and the end of 1 targets"
    assert encode_all(Characters(), [Example("a", "b")], 4).cut_report(4) is None


def test_empty_prompt_still_gives_the_first_token_a_context():
    assert encode(Characters(), Example("", "x")).labels == [IGNORED, 120, 0]
    assert encode_prompt(Characters(), "abc", 2) == [98, 99]


class Beginning(Characters):
    """Puts a beginning-of-text token in front, unless told not to, as Llama's tokenizers do."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        plain = super().__call__(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [1, *plain] if add_special_tokens else plain}


def test_texts_start_as_the_tokenizer_says_also_when_they_are_cut():
    assert encode(Beginning(), Example("ab", "c")).input_ids == [1, 97, 98, 99, 0]
    item = encode(Beginning(), Example("abcdef", "xy"), 5)
    assert item == Encoded([1, 102, 120, 121, 0], [IGNORED, IGNORED, 120, 121, 0], prompt_cut=5)
    assert encode_all(Beginning(), [Example("abcdef", "xy")], 5).items == [item]
    assert encode_prompt(Beginning(), "abc", 2) == [1, 99] and encode_prompt(Beginning(), "abc") == [1, 97, 98, 99]
    assert encode_prompt(Beginning(), "") == [1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_masks(side):
    batch = Collator(7, side)([Encoded([1, 2, 3], [IGNORED, 2, 3]), Encoded([4], [4])])
    right = side == "right"
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7] if right else [7, 7, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0] if right else [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100] if right else [-100, -100, 4]]


def test_hold_out_is_a_partition_that_depends_on_the_seed():
    examples = [Example(str(index), "x") for index in range(50)]
    kept, held = hold_out(examples, 0.1, seed=1)
    assert len(held) == 5 and sorted(kept + held, key=lambda e: int(e.prompt)) == examples
    assert hold_out(examples, 0.1, seed=1) == (kept, held) != hold_out(examples, 0.1, seed=2)
    assert hold_out(examples, 0.0) == (examples, [])
    assert len(hold_out(examples[:2], 0.01)[1]) == 1

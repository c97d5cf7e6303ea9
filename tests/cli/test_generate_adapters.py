"""`ssmtune generate --adapters`: prompts that each name the adapter of a directory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmtune.cli.main import main
from ssmtune.generation import generate_texts
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.stored_adapters import load_trained
from ssmtune.weights import save_weights

ROWS = [("the sea", "waves"), ("the sun is", None), ("blue", "rays"), ("the sea", "rays"), ("the sun is red", "waves")]


def store(checkpoint, folder, method, seed=0):
    """Store an adapter of a method, with noise in it."""
    model = apply_method(load_model(checkpoint)[0], method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "lora" in method else 5))
    save_weights(model, folder)


@pytest.fixture(scope="module")
def stored(tiny_checkpoint, tmp_path_factory):
    """Adapters of three methods; not to be written to. Of each the first is an adapter directory, the other a run's."""
    root = tmp_path_factory.mktemp("adapters")
    for method in ("state-offset", "initial-state", "lora"):
        store(tiny_checkpoint, root / method / "waves", method, 1)
        store(tiny_checkpoint, root / method / "rays" / "adapter", method, 2)
    return root


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt} | ({"adapter": adapter} if adapter else {}) for prompt, adapter in ROWS]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    return file


def generate(*arguments):
    return main(["generate", *map(str, arguments), "--max-new-tokens", "6"])


@pytest.mark.parametrize("method", ["state-offset", "initial-state", "lora"])
def test_texts_are_those_of_each_adapter_alone(stored, prompts, tiny_checkpoint, tmp_path, capsys, method):
    out = tmp_path / "texts.jsonl"
    assert generate("--adapters", stored / method, "--prompts", prompts, "--out", out, "--batch-size", 3) == 0
    written = capsys.readouterr()
    assert written.out == f"texts    {out} (5, by 2 adapters)\n" and written.err.endswith("prompt 5/5\n")
    texts = []
    for prompt, adapter in ROWS:
        place = tiny_checkpoint if adapter is None else stored / method / adapter
        texts.append(generate_texts(*load_trained(str(place)), [prompt], 6)[0])
    expected = [
        {"prompt": prompt, "adapter": adapter, "text": text}
        for (prompt, adapter), text in zip(ROWS, texts, strict=True)
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len({text for (prompt, _), text in zip(ROWS, texts, strict=True) if prompt == "the sea"}) == 2
    assert generate("--adapters", stored / method, "--prompts", prompts) == 0
    assert capsys.readouterr().out == out.read_text()


def test_the_base_alone_has_to_be_named(stored, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "the sea", "adapter": null}')
    options = ["--adapters", stored / "lora", "--prompts", tmp_path / "p.jsonl"]
    assert generate(*options) == 2
    assert "no prompt names an adapter, so the base model is not known" in capsys.readouterr().err
    assert generate(tiny_checkpoint, *options) == 0
    text = generate_texts(*load_model(tiny_checkpoint), ["the sea"], 6)[0]
    assert json.loads(capsys.readouterr().out) == {"prompt": "the sea", "adapter": None, "text": text}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "adapter": "wave"}', "line 3 names the adapter 'wave', which is not in"),
        ('{"prompt": "a", "adapter": "../lora/waves"}', "line 3 names the adapter '../lora/waves'"),
        ('{"prompt": "a", "adaptor": "waves"}', "line 3 has 'adaptor'; did you mean 'adapter'?"),
        ('{"prompt": "a", "adapter": 3}', "line 3 has prompt 'a' and adapter 3"),
        ('{"adapter": "waves"}', "line 3 has prompt None"),
        ('{"prompt": "a"', "line 3 is not valid JSON"),
        ('["a"]', "line 3 holds a list"),
    ],
)
def test_wrong_lines_are_named(stored, prompts, tmp_path, capsys, line, message):
    prompts.write_text('{"prompt": "the sea", "adapter": "waves"}\n\n' + line)
    out = tmp_path / "texts.jsonl"
    out.write_text("before")
    assert generate("--adapters", stored / "lora", "--prompts", prompts, "--out", out) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and 2 <= len(error.splitlines()) <= 4, error
    assert out.read_text() == "before" and {path.name for path in tmp_path.iterdir()} == {prompts.name, out.name}
    if "'wave'," in message:
        assert "did you mean 'waves'?" in error and "Adapters there: rays, waves." in error


def of_another_base(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "mamba-5m"}))


def with_nan(folder):
    file = folder / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    list(tensors.values())[-1].view(-1)[0] = float("nan")
    save_file(tensors, file)


@pytest.mark.parametrize(
    "method, damage, message",
    [
        ("state-offset", of_another_base, "and 'zeal' for 'mamba-5m'"),
        ("state-offset", with_nan, "adapter 'zeal': state_offset_h of backbone.layers.1.mixer holds 1 values"),
        ("lora", with_nan, "zeal/adapter_model.safetensors holds NaN or infinity in 1 tensors"),
        ("initial-state", None, "'zeal' of INITIAL_STATE"),
        ("prompt-tuning", None, "'zeal' is an adapter of PROMPT_TUNING, which a batch of several adapters cannot have"),
        ("dora", None, "'zeal' is an adapter of LORA with DoRA"),
        ("sdt", None, "'zeal' is an adapter of SPARSE_DIMENSION"),
    ],
)
def test_adapters_that_do_not_go_together(stored, tiny_checkpoint, tmp_path, capsys, method, damage, message):
    folder = tmp_path / "adapters"
    store(tiny_checkpoint, folder / "zeal", method)
    others = method if damage else "state-offset"
    (folder / "waves").symlink_to(stored / others / "waves")
    if damage:
        damage(folder / "zeal")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "adapter": "waves"}\n{"prompt": "a", "adapter": "zeal"}')
    assert generate("--adapters", folder, "--prompts", tmp_path / "p.jsonl") == 1
    error = capsys.readouterr().err
    text = error[error.index("ssmtune: error:") :]
    assert message in text and 2 <= len(text.splitlines()) <= 4, text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--adapters", "d", "--prompt", "a"],
        ["m", "--prompts", "p"],
        ["m", "--prompt", "a", "--out", "o"],
        ["--prompt", "a"],
        ["--adapters", "d", "--prompts", "p", "--base"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *arguments])
    assert stopped.value.code == 2


@pytest.mark.parametrize("missing", ["adapters", "prompts", "out"])
def test_missing_places_are_explained(stored, prompts, tmp_path, capsys, missing):
    places = {"adapters": stored / "lora", "prompts": prompts, "out": tmp_path / "texts.jsonl"}
    places[missing] = tmp_path / "none" / "x.jsonl"
    assert generate(*(word for name, place in places.items() for word in (f"--{name}", place))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2

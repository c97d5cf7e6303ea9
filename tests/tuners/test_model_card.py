"""The model card that is written with an adapter, and the way to the hub and back."""

import re
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ssmtune
from ssmtune import InitialStateConfig, StateOffsetConfig


@pytest.fixture
def model(tiny_mamba, tmp_path):
    """A base model that has been stored, so that it has a name."""
    tiny_mamba.save_pretrained(tmp_path / "some-base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "some-base")


def rows(card):
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]*?) \|$", card.text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            StateOffsetConfig(task_type="CAUSAL_LM"),
            {"method": "State-offset Tuning (h)", "rank": "whole", "trained parameters": "1,024 in 2 mixers"},
        ),
        (
            StateOffsetConfig(target="y", layers_to_transform=[1]),
            {"method": "State-offset Tuning (y)", "layers": "1", "trained parameters": "64 in 1 mixer"},
        ),
        (
            InitialStateConfig(rank=2, alpha=4, dropout=0.1, modules_to_save=["norm_f"]),
            {"method": "Initial State Tuning", "rank": "2, scaled by 2", "dropout": "0.1", "also trained": "`norm_f`"}
            | {"trained parameters": "288 in 2 mixers", "layers": "all", "learned convolution state": "no"},
        ),
        (
            InitialStateConfig(conv_state=True, reparametrize=3),
            {"learned convolution state": "yes", "trained parameters": "1,408 in 2 mixers"},
        ),
    ],
    ids=["offset-h", "offset-y", "initial-rank2", "initial-conv"],
)
def test_names_the_base_the_method_and_its_settings(model, config, expected, tmp_path):
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    base = str(tmp_path / "some-base")
    assert rows(card).items() >= {**expected, "base model": f"`{base}`"}.items()
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    own = "initial-state-tuning" if isinstance(config, InitialStateConfig) else "state-offset-tuning"
    assert {"ssmtune", "state-space-model", own} <= set(card.data.tags)
    assert card.data.pipeline_tag == ("text-generation" if config.task_type else None)
    assert f"# {expected.get('method', 'Initial State Tuning')} of some-base\n" in card.text
    for text in ("Import `ssmtune` before", "arxiv.org/abs/2503.03499", f"- ssmtune {ssmtune.__version__}\n"):
        assert card.text.count(text) == 1
    assert card.text.count(f"- PEFT {peft.__version__}\n") == 1
    assert "More Information Needed" not in card.text


def test_the_code_on_it_loads_the_adapter(model, make_nonzero, tmp_path, input_ids, logits):
    expected = make_nonzero(get_peft_model(model, StateOffsetConfig()))
    expected.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names = {}
    exec(code.replace("path/or/name-of-this-adapter", str(tmp_path / "adapter")), names)
    assert torch.equal(logits(names["model"], input_ids), logits(expected.eval(), input_ids))


def test_text_of_the_user_is_kept_and_the_rest_renewed(model, tmp_path):
    adapted = get_peft_model(model, StateOffsetConfig())
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    card = ModelCard.load(path)
    card.data.license = "mit"
    card.text = card.text.replace("1,024", "many") + "\n## Notes\n\nTrained on poems.\n"
    card.save(path)
    for _ in range(2):
        adapted.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(path)
    assert card.data.license == "mit" and card.text.endswith("## Notes\n\nTrained on poems.\n")
    assert rows(card)["trained parameters"] == "1,024 in 2 mixers" and card.text.count("# State-offset Tuning") == 1


def test_a_card_of_the_user_is_added_to(model, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Poems\n\nMine.\n")
    get_peft_model(model, StateOffsetConfig()).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.license == "mit" and "# Poems\n\nMine." in card.text and "How to load" in card.text


def test_several_adapters_have_one_each_and_one_together(model, tmp_path):
    get_peft_model(model, LoraConfig(target_modules=["in_proj"], r=2), adapter_name="low")
    both = get_peft_model(model, InitialStateConfig(), adapter_name="start")
    for _ in range(2):
        both.save_pretrained(tmp_path / "both")
    assert rows(ModelCard.load(tmp_path / "both" / "start" / "README.md"))["method"] == "Initial State Tuning"
    assert not (tmp_path / "both" / "low" / "README.md").exists()
    card = ModelCard.load(tmp_path / "both" / "README.md")
    assert "# Adapters of some-base\n" in card.text and "More Information Needed" not in card.text
    assert "ssmtune" in card.data.tags and card.data.base_model == str(tmp_path / "some-base")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names = {}
    exec(code.replace("path/to/this-folder", str(tmp_path / "both")), names)
    assert set(names["model"].peft_config) == {"low", "start"}
    (tmp_path / "both" / "README.md").write_text("# Mine\n")
    both.save_pretrained(tmp_path / "both")
    assert "# Mine" in (tmp_path / "both" / "README.md").read_text()


def test_a_base_without_a_name(tiny_mamba, tmp_path):
    get_peft_model(tiny_mamba, StateOffsetConfig()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert rows(card)["base model"] == "not known" and "# State-offset Tuning (h)\n" in card.text


def test_a_config_alone_has_no_card(tmp_path):
    StateOffsetConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the hub: repositories are folders in it."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, **kwargs):
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

    def upload(self, working_dir, repo_id, *args, **kwargs):
        shutil.copytree(working_dir, root / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, subfolder=None, **kwargs):
        path = root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise FileNotFoundError(path)
        return str(path)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("# Theirs\n"))
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    for module in ("peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr(
        "peft.utils.save_and_load.file_exists", lambda repo_id, filename, **_: (root / repo_id / filename).is_file()
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return root


@pytest.mark.parametrize(
    "config", [StateOffsetConfig(), InitialStateConfig(conv_state=True)], ids=["offset", "initial"]
)
def test_to_the_hub_and_back(model, hub, config, make_nonzero, tmp_path, input_ids, logits):
    config.task_type = "CAUSAL_LM"
    adapted = make_nonzero(get_peft_model(model, config)).eval()
    adapted.push_to_hub("someone/poems")
    stored = {path.name for path in (hub / "someone" / "poems").iterdir()}
    assert stored == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    # transformers writes a card of its own over the stored one: a folder that is uploaded as it is keeps it
    assert "# Theirs" in (hub / "someone" / "poems" / "README.md").read_text()
    expected = logits(adapted, input_ids)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "some-base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, "someone/poems"), input_ids), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("someone/poems"), input_ids), expected)

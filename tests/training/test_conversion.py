"""Checkpoints of mamba_ssm without the package; tests/mixers/test_mamba_ssm.py has it."""

import json

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Mamba2Config, Mamba2ForCausalLM

from ssmtune import from_mamba_ssm, patch, to_mamba_ssm

HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "time_step_limit": (0.01, 1.0)}


@pytest.fixture
def tiny_mamba2():
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, chunk_size=8, **HEADS))


@pytest.mark.parametrize("name", ["tiny_mamba", "tiny_mamba2"])
def test_a_model_comes_back_as_it_was(request, name, tmp_path):
    model = request.getfixturevalue(name).eval()
    patch(model)
    to_mamba_ssm(model, tmp_path)
    again = from_mamba_ssm(tmp_path)
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    input_ids = torch.randint(0, 64, (2, 7))
    patch(again)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, again(input_ids).logits)
    tied = again.lm_head.weight is again.backbone.embeddings.weight
    assert tied == model.config.tie_word_embeddings


def test_the_names_and_sizes_are_those_of_mamba_ssm(tiny_mamba2, tmp_path):
    to_mamba_ssm(tiny_mamba2.bfloat16(), tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert weights["backbone.embedding.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["d_model"], config["n_layer"], config["vocab_size"]) == (32, 2, 64)
    expected = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "dt_limit": [0.01, 1.0]}
    assert expected.items() <= config["ssm_cfg"].items()
    assert from_mamba_ssm(tmp_path).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"d_intermediate": 64}, "MLPs between the mixers"),
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layers of the kind 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm=False"),
        ({"ssm_cfg": {"layer": "Mamba2", "new": 1}}, "new=1"),
    ],
)
def test_what_transformers_has_no_place_for_is_named(tiny_mamba, tmp_path, change, reason):
    to_mamba_ssm(tiny_mamba, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        from_mamba_ssm(tmp_path)


def test_a_folder_that_is_no_such_checkpoint_is_refused(tiny_mamba, tmp_path):
    with pytest.raises(ValueError, match="as a checkpoint of mamba_ssm"):
        from_mamba_ssm(tmp_path)
    tiny_mamba.save_pretrained(tmp_path)
    torch.save(tiny_mamba.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no d_model"):
        from_mamba_ssm(tmp_path)
    # A pickle that would run code.
    torch.save(print, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can run code"):
        from_mamba_ssm(tmp_path)


def test_weights_that_are_not_those_of_the_config_are_refused(tiny_mamba, tmp_path):
    to_mamba_ssm(tiny_mamba, tmp_path)
    for changes, reason in (
        ({"backbone.embedding.weight": None}, "backbone.embeddings.weight"),
        ({"backbone.layers.1.mixer.D": torch.ones(3)}, "backbone.layers.1.mixer.D"),
    ):
        weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True) | changes
        torch.save({key: tensor for key, tensor in weights.items() if tensor is not None}, tmp_path / "other.bin")
        other = tmp_path / reason
        other.mkdir()
        (tmp_path / "other.bin").rename(other / "pytorch_model.bin")
        (other / "config.json").write_text((tmp_path / "config.json").read_text())
        with pytest.raises(ValueError, match=f"(?s)not what its config says: .*{reason}.*save it again"):
            from_mamba_ssm(other)


def test_other_models_and_adapters_are_refused(tiny_mamba, tmp_path):
    from peft import get_peft_model

    from ssmtune import StateOffsetConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ValueError, match="a GPTNeoXForCausalLM"):
        to_mamba_ssm(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, **sizes)), tmp_path)
    get_peft_model(tiny_mamba, StateOffsetConfig())
    with pytest.raises(ValueError, match="unloaded first"):
        to_mamba_ssm(tiny_mamba, tmp_path)

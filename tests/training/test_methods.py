import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from ssmtune.config import ConfigError, MethodConfig
from ssmtune.gradcheck import check_gradients
from ssmtune.methods import METHODS, apply_method, get_method, method_options
from ssmtune.methods.combined import COMBINED_METHODS
from ssmtune.methods.own_weights import OWN_WEIGHT_METHODS
from ssmtune.mixers import patch
from ssmtune.models import load_model
from ssmtune.stored_adapters import load_adapter
from ssmtune.weights import parameter_counts, save_weights

ADAPTERS = [name for name in METHODS if name != "full"]
SUBSETS = [method.name for method in OWN_WEIGHT_METHODS if method.name != "full"]
COMBINED = [method.name for method in COMBINED_METHODS]


@pytest.fixture
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)[0]


def batch():
    tokens = torch.randint(0, 250, (2, 9))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_tensor_receives_a_gradient(model, name):
    model = apply_method(model, name)
    report = check_gradients(model, batch())
    assert report.ok, str(report)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in SUBSETS])
def test_only_the_adapter_is_trainable(model, name):
    weights = {id(parameter) for parameter in model.parameters()}
    adapted = apply_method(model, name)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trainable and not weights & {id(parameter) for parameter in trainable}
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    assert weights <= {id(parameter) for parameter in adapted.parameters()}


def test_full_trains_every_weight(model):
    assert all(parameter.requires_grad for parameter in apply_method(model, "full").parameters())


@pytest.mark.parametrize("name", [name for name in ADAPTERS if METHODS[name].kind != "prompt"])
def test_model_equals_its_base_before_the_first_step(model, name):
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(apply_method(model, name)(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["lora", "prompt-tuning", "p-tuning", "prefix-tuning", "state-offset-low-rank"])
def test_random_initialisation_depends_on_the_seed_alone(tiny_checkpoint, name):
    def tensors(seed):
        model = load_model(tiny_checkpoint)[0]
        torch.rand(3)
        state = torch.random.get_rng_state()
        adapted = apply_method(model, name, {}, seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for p in adapted.parameters() if p.requires_grad])

    first = tensors(1)
    assert torch.equal(first, tensors(1)) and not torch.equal(first, tensors(2))


def test_options_of_the_state_methods_reach_the_adapter(tiny_checkpoint):
    def configured(name, **options):
        model = apply_method(load_model(tiny_checkpoint)[0], name, options)
        return model.peft_config["default"]

    assert configured("initial-state", conv_state=True).conv_state
    low = configured("state-offset", rank=2, alpha=4.0, dropout=0.25, layers=[1])
    assert (low.rank, low.alpha, low.dropout, low.layers_to_transform) == (2, 4.0, 0.25, [1])
    assert configured("state-offset-y", reparametrize=8).reparametrize == 8


def test_options_reach_the_adapter(model):
    adapted = apply_method(model, "lora", {"rank": 2, "alpha": 6, "target_modules": ["in_proj"], "layers": [1]})
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 and all("layers.1.mixer.in_proj" in name for name in names)
    assert adapted.base_model.model.backbone.layers[1].mixer.in_proj.scaling["default"] == 3.0


@pytest.mark.parametrize("name", ["state-offset", "initial-state"])
def test_state_methods_take_a_rank_and_layers(model, name):
    adapted = apply_method(model, name, {"rank": 2, "layers": [0]})
    sizes = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sizes == 2 * (64 + 8)


def test_a_method_that_does_not_fit_names_those_that_do():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for name, reason in (
        ("state-offset", "it has no recurrent mixer that ssmtune drives"),
        ("lora-s6", "it has no module x_proj or dt_proj"),
        ("bitfit", "it has no bias"),
    ):
        with pytest.raises(ConfigError) as caught:
            apply_method(LlamaForCausalLM(config), name)
        first, _, second = str(caught.value).partition("\n  Methods that do: ")
        assert first == f"method {name!r} does not apply to LlamaForCausalLM: {reason}."
        assert {"lora", "ia3", "prefix-tuning"} < set(second.rstrip(".").split(", ")) < set(METHODS) - {name}


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'state-offset'"):
        get_method("state-ofset")


def test_an_option_of_another_method_is_refused(model):
    with pytest.raises(ConfigError, match="'state-offset-y' has no option 'rank'"):
        method_options(MethodConfig("state-offset-y", rank=4))
    with pytest.raises(ConfigError, match="'full' has no option 'virtual_tokens'"):
        apply_method(model, "full", {"virtual_tokens": 4})
    assert method_options(MethodConfig("lora", rank=4)) == {"rank": 4}


SIZE_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("bitfit", {}, 73_728),
        ("layer-norm", {}, 25 * 768),
        ("s6", {}, 5_566_464),
        ("embeddings", {}, 50280 * 768),
        ("last-layers", {"last_layers": 24}, 129_135_360 - 50280 * 768 - 768),
        ("lora-s6", {}, 24 * 8 * (1536 + 80 + 48 + 1536)),
        ("initial-state", {}, 589_824),
        ("state-offset", {}, 589_824),
        ("state-offset-low-rank", {}, 24 * 4 * (1536 + 16)),
        ("state-offset-y", {}, 36_864),
        ("prefix-tuning", {}, 24 * 16 * 768),
        ("prefix-tuning", {"reparametrize": 32}, 24 * (16 * 768 + 2 * 768 * 32 + 768 + 32)),
        ("sdt", {}, 24 * (15 * 2 + 2 * 15 * 16)),
        ("sdt", {"channels": 0.1, "states": 0.5, "layers": [1]}, 154 * 8 + 2 * 154 * 16),
        ("lora+sdt", {}, 24 * (8 * (768 + 3072) + 15 * 2 + 2 * 15 * 16)),
        ("prefix-tuning-mlp", {}, 24 * (16 * 768 + 2 * 768 * 384 + 768 + 384)),
        ("iterative-suffix", {}, 24 * 16 * 768),
        ("additional-scan", {}, 884_736),
        ("additional-scan", {"extra_states": 6, "layers": [0]}, 3 * 6 * 1536),
        ("initial-state+state-offset", {}, 2 * 589_824),
        ("lora+state-offset", {"target_modules": ["x_proj", "dt_proj"]}, 24 * 8 * (1536 + 80 + 48 + 1536) + 589_824),
    ],
)
def test_trainable_parameters_of_mamba_130m(name, options, expected):
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(**SIZE_130M))
    patch(model)
    assert parameter_counts(model)[1] == 129_135_360
    assert parameter_counts(apply_method(model, name, options))[0] == expected


def test_embeddings_and_head_that_are_not_tied_are_both_trained():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=False)
    model = apply_method(MambaForCausalLM(config), "embeddings")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["base_model.model.backbone.embeddings.weight", "base_model.model.lm_head.weight"]


def test_last_layers_are_counted_from_the_end(model):
    adapted = apply_method(model, "last-layers", {"last_layers": 1})
    names = {name.split(".")[4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names == {"1"}
    with pytest.raises(ConfigError, match="last_layers is 3, but MambaForCausalLM has 2"):
        apply_method(model, "last-layers", {"last_layers": 3})


def test_p_tuning_stores_its_prompt_alone(model, tmp_path):
    adapted = apply_method(model, "p-tuning", {"virtual_tokens": 3, "reparametrize": 8})
    # an embedding per token, and three linear layers by way of 8 units
    assert parameter_counts(adapted)[0] == 3 * 32 + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 32 + 32)
    save_weights(adapted, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {"prompt_embeddings": (3, 32)}


@pytest.mark.parametrize("name", COMBINED)
def test_both_adapters_of_a_combination_are_stored(model, tmp_path, name):
    adapted = apply_method(model, name)
    save_weights(adapted, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "beside/adapter_config.json").is_file()
    (tmp_path / "beside/adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="beside/adapter_model.safetensors cannot be read"):
        load_adapter(model, tmp_path)


def test_norms_are_found_by_what_families_call_them():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = apply_method(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)), "layer-norm")
    names = {name.split("transformer.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{norm}.{kind}" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")}

"""Initial State Tuning beside the package s0-tuning, which has to be installed: pip install s0-tuning==0.1.2."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer, FalconH1ForCausalLM, Qwen3_5ForCausalLM, TrainerCallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import ssmtune
from ssmtune.config import MethodConfig, RunConfig, TrainConfig
from ssmtune.config_files import load_config
from ssmtune.data import Example, encode
from ssmtune.methods import apply_method, method_options
from ssmtune.models import load_model
from ssmtune.training import train

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
FALCON = {"num_hidden_layers": 2, "num_key_value_heads": 4, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}
FALCON |= {"mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
QWEN = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}
# As many key heads as others: the rule that s0-tuning puts in the place of transformers' knows no groups.
QWEN |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
QWEN |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# Equally long targets, so that the mean over tokens is the mean over examples that s0-tuning takes.
EXAMPLES = [Example("the sea" + " is" * n, f" {n}{n + 1}{n + 2}") for n in range(5)]
STEPS = 20
RULE = "torch_chunk_gated_delta_rule"


def random_model(model_class, **config):
    """A model whose states last and matter, unlike those of a new one."""
    model = model_class(model_class.config_class(**SIZES, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif name.endswith("dt_bias"):
                parameter.fill_(-4.0)
    return model


@pytest.fixture
def base():
    return random_model(FalconH1ForCausalLM, **FALCON)


@pytest.fixture(params=["falcon-h1", "qwen3.5"])
def any_base(request, base, monkeypatch):
    if request.param == "falcon-h1":
        return base
    # s0-tuning puts another function in its place, for the whole process.
    monkeypatch.setattr(modeling_qwen3_5, RULE, getattr(modeling_qwen3_5, RULE))
    return random_model(Qwen3_5ForCausalLM, **QWEN)


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture
def make_s0(tokenizer):
    """A factory of trainers of s0-tuning, with the examples as they take them."""
    s0 = pytest.importorskip("s0", reason="s0-tuning is not installed")
    from benchmarks.peers.s0_mixer import use_s0_mixers

    def make(model, mixers=use_s0_mixers, **settings):
        encoded = {example.prompt: encode(tokenizer, example) for example in EXAMPLES}

        def tokens(text, **kwargs):
            return {"input_ids": torch.tensor([encoded[text].input_ids])}

        data = [(prompt, item.labels.count(-100)) for prompt, item in encoded.items()]
        return s0.S0Trainer(mixers(copy.deepcopy(model)), tokens, s0.S0Config(n_steps=STEPS, **settings)), data

    return make


def s0_recipe(**changes) -> RunConfig:
    return load_config("falcon-h1/s0.yaml", {"train.batch_size": len(EXAMPLES), "train.accumulation": 1} | changes)


def test_both_learn_the_same_from_the_same(any_base, tokenizer, make_s0, assert_close):
    # At the rate of the recipe so small a model learns next to nothing in 20 steps.
    trainer, data = make_s0(any_base, lr=0.1)
    losses = []
    hook = trainer.model.register_forward_hook(lambda *args: losses.append(args[-1].loss.item()))
    trainer.train(data)
    hook.remove()
    expected = torch.tensor(losses).view(STEPS, len(EXAMPLES)).mean(1)

    config = s0_recipe(**{"train.lr": 0.1, "method.inference_scale": trainer._resolve_alpha()})
    ours = apply_method(any_base, config.method.name, method_options(config.method))
    result = train(ours, tokenizer, EXAMPLES, (), config.train, None, progress=False)
    actual = torch.tensor([row["loss"] for row in result.curve if "loss" in row])
    assert_close("losses", expected, actual, 1e-6)
    assert expected[0] - expected.min() > 0.05
    states = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    for layer, (theirs, state) in enumerate(zip(trainer._states.values(), states, strict=True)):
        theirs = theirs if trainer._arch == "mamba2" else theirs.mT
        assert_close(f"state {layer}", theirs.flatten(0, 1), state, 1e-4)

    trainer.activate()
    input_ids = torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        assert_close("logits", trainer.model(input_ids).logits, ours(input_ids).logits, 1e-4)


def test_s0_tuning_does_not_know_transformers_5(any_base, make_s0):
    # The reason for what is in s0_mixer.py: should this one fail, s0-tuning has been repaired.
    trainer, data = make_s0(any_base, mixers=lambda model: model)
    # The states of a Qwen3.5 reach nothing, and nothing else trains.
    with pytest.raises((AttributeError, RuntimeError), match="cuda_kernels_forward|does not require grad"):
        trainer.train(data)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.3}, {"alpha": 2.0, "normalize": True}], ids=str)
def test_states_that_s0_tuning_saved(any_base, make_s0, tmp_path, assert_close, settings):
    trainer, data = make_s0(any_base, lr=1.0, **settings)
    trainer.config.n_steps = 1
    trainer.train(data)
    trainer.save(tmp_path)
    trainer.activate()
    input_ids = torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        expected = trainer.model(input_ids).logits
        ours = ssmtune.load_s0_states(copy.deepcopy(any_base), tmp_path)
        assert_close("logits", expected, ours(input_ids).logits, 1e-5)
        assert (any_base(input_ids).logits - expected).abs().max() > 1e-3
        ours.save_pretrained(tmp_path / "adapter")
        again = ssmtune.load_adapters(any_base, tmp_path / "adapter").eval()
        assert_close("logits", expected, again(input_ids).logits, 1e-5)


@pytest.fixture
def saved(base, tmp_path):
    """States in the files of s0-tuning."""
    states = {str(layer): torch.randn(8, 8, 8) for layer in range(2)}
    torch.save(states, tmp_path / "states.pt")
    (tmp_path / "config.json").write_text(json.dumps({"alpha": None, "normalize": False}))
    (tmp_path / "meta.json").write_text(json.dumps({"arch": "mamba2", "recurrent_layers": [0, 1]}))
    return states


def test_states_in_a_torch_file_beside_another_adapter(base, saved, tmp_path):
    model = ssmtune.load_s0_states(base, tmp_path)
    del saved["0"]
    torch.save(saved, tmp_path / "states.pt")
    model = ssmtune.load_s0_states(model, tmp_path, "second")
    assert model.active_adapters == ["second"] and set(model.peft_config) == {"default", "second"}
    first, second = (layer.mamba.start_adapter for layer in model.base_model.model.model.layers)
    assert first.available_adapters == {"default"}
    assert torch.equal(second.value("h", "second", training=True), saved["1"].flatten(0, 1))
    assert torch.equal(second.value("h", "second"), 0.65 * saved["1"].flatten(0, 1))


def test_states_that_do_not_fit_are_refused(base, saved, tmp_path):
    for wrong, reason in (
        ({"0": torch.zeros(8, 8, 4)}, r"\(8, 8, 4\) for layer 0, and this model has \(8, 8, 8\) there"),
        ({"7": torch.zeros(8, 8, 8)}, r"mixers in the layers \[0, 1\]"),
        ({}, "none at all"),
        ({"0": torch.full((8, 8, 8), torch.nan)}, "NaN"),
        (print, "can run code"),
    ):
        torch.save(wrong, tmp_path / "states.pt")
        with pytest.raises(ValueError, match=reason):
            ssmtune.load_s0_states(base, tmp_path)
    torch.save(saved, tmp_path / "states.pt")
    (tmp_path / "meta.json").write_text(json.dumps({"arch": "rwkv"}))
    with pytest.raises(ValueError, match="architecture 'rwkv'"):
        ssmtune.load_s0_states(base, tmp_path)
    (tmp_path / "states.pt").unlink()
    with pytest.raises(ValueError, match="has to hold states.safetensors or states.pt"):
        ssmtune.load_s0_states(base, tmp_path)


class Gradients(TrainerCallback):
    """The gradients that the optimizer gets, of all steps."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.stack([p.grad.clone() for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_l2_pulls_once_a_step_and_before_clipping(tiny_checkpoint, tokenizer, assert_close, accumulation):
    def gradients(**changes):
        model = apply_method(load_model(tiny_checkpoint)[0], "initial-state")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(1.0)
        seen = Gradients()
        config = TrainConfig(steps=1, lr=1e-3, batch_size=2, accumulation=accumulation, **changes)
        train(model, tokenizer, EXAMPLES, (), config, None, callbacks=[seen], progress=False)
        (gradient,) = seen.seen
        return gradient

    pulled = gradients(l2=0.25, clip=1e9)
    assert_close("gradient", gradients(clip=1e9) + 0.5, pulled, 1e-6)
    assert_close("clipped", pulled / pulled.norm(), gradients(l2=0.25, clip=1.0), 1e-5)


def test_the_rate_stays_where_it_is(tiny_checkpoint, tokenizer):
    model = apply_method(load_model(tiny_checkpoint)[0], "initial-state")
    config = TrainConfig(steps=5, lr=1e-3, batch_size=2, warmup=0.4, schedule="constant", log_every=1)
    result = train(model, tokenizer, EXAMPLES, (), config, None, progress=False)
    assert [row["lr"] for row in result.curve] == [0.0, 5e-4, 1e-3, 1e-3, 1e-3]


def test_l2_needs_gradients(tiny_mamba, tokenizer):
    config = TrainConfig(steps=1, lr=1e-3, l2=0.1, optimizer="mezo")
    with pytest.raises(ssmtune.ConfigError, match="no gradients to add it to"):
        train(apply_method(tiny_mamba, "initial-state"), tokenizer, EXAMPLES, (), config, None)


def test_the_scale_is_of_evaluation_alone(tiny_mamba):
    model = apply_method(
        tiny_mamba, "initial-state", method_options(MethodConfig("initial-state", inference_scale=0.5))
    )
    layer = tiny_mamba.backbone.layers[0].mixer.start_adapter
    layer.assign("h", "default", torch.ones(layer.dim, layer.dstate))
    for training, expected in ((False, 1.0), (True, 2.0)):
        assert (model.train(training) and layer.state_inputs().initial_state == expected).all()
    model.add_weighted_adapter(["default"], [3.0], "mixed")
    assert (layer.value("h", "mixed") == 3.0).all()
    for options in ({"inference_scale": 0.0}, {"inference_scale": 0.5, "rank": 2}):
        with pytest.raises(ValueError, match="inference_scale"):
            ssmtune.InitialStateConfig(**options)

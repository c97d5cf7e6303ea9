"""The families and methods that the conformance checks combine, and what the checks are run on.

A new family is one more `Family` in FAMILIES, a new method one more `Method` in METHODS.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import ssmtune.methods
from ssmtune.methods import apply_method
from ssmtune.methods.needs import Need, modules
from ssmtune.mixers import find_mixers, patch


# the tests are no package: what they share is loaded from its file
def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models_page = _load("models_page")
_load("capabilities_page")


@dataclass(frozen=True)
class Family:
    """One model architecture.

    Args:
        name: what transformers puts in front of `ForCausalLM`.
        config: sizes of a tiny model; a hybrid has a layer of attention.
        like: a family with the same mixers. Methods that are not among TELLING are then left to slow tests.
    """

    name: str
    config: dict = field(hash=False)
    like: str | None = None

    def make(self) -> nn.Module:
        """A random model of transformers in which every parameter matters: small ones would hide what is wrong."""
        model_class = getattr(transformers, f"{self.name}ForCausalLM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**EVERY | self.config))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn_like(parameter)
                    if name.endswith(("dt_proj.bias", "dt_proj_bias", "dt_bias")):
                        # steps of 0.1: long enough to be felt, short enough for the first token to be remembered
                        parameter.copy_(noise - 2)
                    elif parameter.dim() == 1 or "A_log" in name or name.endswith(("bias", "D")):
                        parameter.add_(0.3 * noise)
                    else:
                        parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        return model.eval()


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: what the page calls it.
        kind: what is trained, as in `ssmtune.methods.Method`.
        apply: makes a patched model ready to be trained.
        needs: why a model cannot be trained so, or None, as in `ssmtune.methods.Method`.
    """

    name: str
    kind: str
    apply: Callable[[nn.Module], nn.Module]
    needs: Need

    @property
    def target(self) -> str | None:
        """The projection that LoRA adapts, where it is a single one."""
        return self.name.partition("LoRA ")[2] or None


def _method(name: str, registered: str, **options) -> Method:
    method = ssmtune.methods.METHODS[registered]
    return Method(name, method.kind, lambda model: apply_method(model, registered, options), method.needs)


def _lora(target: str) -> Method:
    return replace(_method(f"LoRA {target}", "lora", rank=2, target_modules=[target]), needs=modules(target))


EVERY = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
PURE = {"state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
HEADS = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
HYBRID = {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
ATTENTION = {"num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    # A random query may meet no key at all, and the norm would blow up what it reads.
    "rms_norm_eps": 1e-3,
}
# Every token goes to both experts: were it one, rounding to bfloat16 could send a token elsewhere.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
FAMILIES = [
    Family("Mamba", PURE),
    Family("FalconMamba", PURE),
    Family("Jamba", HYBRID | EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1}),
    # The attention is shared, so there have to be two layers of it.
    Family("Zamba", HYBRID | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
    Family("Mamba2", HEADS | {"num_hidden_layers": 2}),
    Family(
        "Zamba2",
        ATTENTION
        | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "adapter_rank": 4}
        | {"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 2, "chunk_size": 4, "num_key_value_heads": 4},
        like="Mamba2",
    ),
    Family("Bamba", ATTENTION | MAMBA_HEADS | {"attn_layer_indices": [1], "num_key_value_heads": 2}, like="Mamba2"),
    Family(
        "NemotronH",
        ATTENTION
        | {"layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"]}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4}
        | {"head_dim": 8, "num_key_value_heads": 2},
        like="Mamba2",
    ),
    Family("FalconH1", ATTENTION | MAMBA_HEADS | {"mamba_d_ssm": 64, "num_key_value_heads": 2}, like="Mamba2"),
    Family(
        "GraniteMoeHybrid",
        ATTENTION
        | MAMBA_HEADS
        | {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "shared_intermediate_size": 48}
        | {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        like="Mamba2",
    ),
    Family("Qwen3Next", DELTA),
    Family("GPTNeoX", ATTENTION | {"rotary_pct": 0.5}),
    Family("Llama", ATTENTION | {"num_key_value_heads": 2}),
]

METHODS = [
    _method("full", "full"),
    _method("LoRA", "lora", rank=2),
    *map(_lora, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    _method("DoRA", "dora", rank=2),
    _method("IA3", "ia3"),
    _method("BitFit", "bitfit"),
    _method("S6 only", "s6"),
    _method("prompt", "prompt-tuning", virtual_tokens=3),
    _method("prefix", "prefix-tuning", virtual_tokens=3),
    _method("initial state", "initial-state"),
    _method("initial state, conv", "initial-state", conv_state=True),
    _method("offset (h)", "state-offset"),
    _method("offset (y)", "state-offset-y"),
    _method("offset, low rank", "state-offset", rank=2),
]

# What of the methods here, and of those of the registry, reaches a part of a mixer that the others do not.
TELLING = {"full", "LoRA", "prompt", "prefix", "initial state, conv", "offset (h)", "offset (y)"} | {
    "lora", "prompt-tuning", "prefix-tuning", "initial-state", "state-offset", "state-offset-y",
}  # fmt: skip

_REFUSED = "peft refuses LoRA on `out_proj` of this model type"
_DROPPED = "transformers drops the cache, and with it the prefix, so that ssmtune refuses to train one this way"
# (family, method, check) -> what fails, and why that is not for ssmtune to repair. A repair turns the test red.
KNOWN_FAILURES = {
    ("Mamba", "LoRA out_proj", "creates"): _REFUSED,
    ("FalconMamba", "LoRA out_proj", "creates"): _REFUSED,
    ("Mamba2", "LoRA out_proj", "creates"): _REFUSED,
    ("NemotronH", "LoRA out_proj", "creates"): _REFUSED,
    ("FalconH1", "LoRA out_proj", "creates"): _REFUSED,
    ("GPTNeoX", "prefix", "checkpoints activations"): _DROPPED,
    ("Llama", "prefix", "checkpoints activations"): _DROPPED,
}


def pytest_addoption(parser):
    parser.addoption("--write-models-md", action="store_true", help="write what the checks found to docs/models.md")


def pytest_configure(config):
    if config.getoption("--write-models-md", default=False):
        # the page is of everything: slow tests, which are left out by default, too
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        family = params.get("family")
        if isinstance(family, Family) and family.like:
            method = params["method"].name if "method" in params else params["registered"]
            if method not in TELLING:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    params = getattr(item, "callspec", None) and item.callspec.params
    if params and {"family", "method"} <= params.keys():
        found_by(item.config).record(params["family"].name, params["method"].name, item.function, report)
    return report


def found_by(config) -> models_page.Outcomes:
    """What the checks of this run have found so far."""
    names = ([item.name for item in items] for items in (FAMILIES, METHODS))
    return config.stash.setdefault(models_page.OUTCOMES, models_page.Outcomes(*names))


@pytest.fixture
def outcomes(request) -> models_page.Outcomes:
    return found_by(request.config)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name.replace(" ", "-"))
def method(request) -> Method:
    return request.param


@pytest.fixture(autouse=True)
def _known_failure(request):
    if {"family", "method"} <= set(request.fixturenames):
        family, method = request.getfixturevalue("family"), request.getfixturevalue("method")
        key = (family.name, method.name, models_page.check_name(request.function))
        if key in KNOWN_FAILURES:
            request.applymarker(pytest.mark.xfail(reason=KNOWN_FAILURES[key], strict=True))


@pytest.fixture(scope="module")
def base(family) -> nn.Module:
    """The model of transformers, not patched; not to be changed."""
    return family.make()


@pytest.fixture(scope="module")
def bfloat16_error(base, input_ids, logits, error_ratio) -> float:
    """How far the logits of transformers in bfloat16 are from those in float32 with the same weights."""
    model = copy.deepcopy(base).to(torch.bfloat16)
    return error_ratio(logits(copy.deepcopy(model).float(), input_ids), logits(model, input_ids))


@pytest.fixture(scope="module")
def patched(base) -> nn.Module:
    """The base on the operators of ssmtune, where they have its mixers; not to be changed."""
    model = copy.deepcopy(base)
    if find_mixers(model):
        patch(model)
    return model


@pytest.fixture(scope="module")
def fits(method, base) -> None:
    if (reason := method.needs(base)) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def fresh(family, method, patched, fits) -> nn.Module:
    """A model that the method was applied to, before the first step; not to be changed."""
    if (family.name, method.name, "creates") in KNOWN_FAILURES:
        pytest.skip(KNOWN_FAILURES[family.name, method.name, "creates"])
    return method.apply(copy.deepcopy(patched)).eval()


@pytest.fixture(scope="module")
def trained(method, fresh) -> nn.Module:
    """The same with noise in what is trained, as if it had learnt something; not to be changed."""
    model = copy.deepcopy(fresh)
    if method.kind != "full":
        std = 0.1 if method.kind == "weights" else 0.5
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def input_ids() -> Tensor:
    """(2, 9), without pads."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def logits():
    """A function: the logits at the tokens of a text, without those at a trained prompt before it."""

    def run(model: nn.Module, input_ids: Tensor, **inputs) -> Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids, **inputs).logits[:, -input_ids.shape[1] :]

    return run

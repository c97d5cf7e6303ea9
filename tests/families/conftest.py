"""The families and methods that the conformance checks combine, and what the checks are run on.

A new family is one more `Family` in FAMILIES, a new method one more `Method` in METHODS.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from ssmtune.methods import apply_method
from ssmtune.mixers import patch
from ssmtune.tuners import InitialStateConfig

# the tests are no package: what they share is loaded from its file
_spec = importlib.util.spec_from_file_location("models_page", Path(__file__).with_name("models_page.py"))
models_page = importlib.util.module_from_spec(_spec)
sys.modules["models_page"] = models_page
_spec.loader.exec_module(models_page)


@dataclass(frozen=True)
class Family:
    """One model architecture.

    Args:
        name: what transformers puts in front of `Config` and `ForCausalLM`.
        config: sizes of a tiny model; a hybrid has a layer of attention.
    """

    name: str
    config: dict = field(hash=False)

    def make(self) -> nn.Module:
        """A random model of transformers in which every parameter matters: small ones would hide what is wrong."""
        config = getattr(transformers, f"{self.name}Config")(**EVERY | self.config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{self.name}ForCausalLM")(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn_like(parameter)
                    if name.endswith(("dt_proj.bias", "dt_proj_bias")):
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
        target: the projection that LoRA adapts.
    """

    name: str
    kind: str
    apply: Callable[[nn.Module], nn.Module]
    target: str | None = None


def _lora(target: str) -> Method:
    options = {"rank": 2, "target_modules": [target]}
    return Method(f"LoRA {target}", "weights", lambda model: apply_method(model, "lora", options), target)


EVERY = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
PURE = {"state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
HYBRID = {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
# Every token goes to both experts: were it one, rounding to bfloat16 could send a token elsewhere.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
FAMILIES = [
    Family("Mamba", PURE),
    Family("FalconMamba", PURE),
    Family("Jamba", HYBRID | EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1}),
    # The attention is shared, so there have to be two layers of it.
    Family("Zamba", HYBRID | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
]

METHODS = [
    Method("full", "full", lambda model: apply_method(model, "full")),
    Method("LoRA", "weights", lambda model: apply_method(model, "lora", {"rank": 2})),
    *map(_lora, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    Method("DoRA", "weights", lambda model: apply_method(model, "dora", {"rank": 2})),
    Method("BitFit", "weights", lambda model: apply_method(model, "bitfit")),
    Method("S6 only", "weights", lambda model: apply_method(model, "s6")),
    Method("prompt", "prompt", lambda model: apply_method(model, "prompt-tuning", {"virtual_tokens": 3})),
    Method("initial state", "state", lambda model: apply_method(model, "initial-state")),
    Method(
        "initial state, conv",
        "state",
        lambda model: get_peft_model(model, InitialStateConfig(task_type="CAUSAL_LM", conv_state=True)),
    ),
    Method("offset (h)", "state", lambda model: apply_method(model, "state-offset")),
    Method("offset (y)", "state", lambda model: apply_method(model, "state-offset-y")),
    Method("offset, low rank", "state", lambda model: apply_method(model, "state-offset", {"rank": 2})),
]

_REFUSED = "peft refuses LoRA on `out_proj` of this model type"
# (family, method, check) -> what fails, and why that is not for ssmtune to repair. A repair turns the test red.
KNOWN_FAILURES = {
    ("Mamba", "LoRA out_proj", "creates"): _REFUSED,
    ("FalconMamba", "LoRA out_proj", "creates"): _REFUSED,
}


def pytest_addoption(parser):
    parser.addoption("--write-models-md", action="store_true", help="write what the checks found to docs/models.md")


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
    """The base on the operators of ssmtune; not to be changed."""
    model = copy.deepcopy(base)
    patch(model)
    return model


@pytest.fixture(scope="module")
def target_exists(family, method, base) -> None:
    if method.target and not any(name.endswith(f".{method.target}") for name, _ in base.named_modules()):
        pytest.skip(f"{family.name} has no module `{method.target}`")


@pytest.fixture(scope="module")
def fresh(family, method, patched, target_exists) -> nn.Module:
    """A model that the method was applied to, before the first step; not to be changed."""
    if (family.name, method.name, "creates") in KNOWN_FAILURES:
        pytest.skip(KNOWN_FAILURES[family.name, method.name, "creates"])
    return method.apply(copy.deepcopy(patched)).eval()


@pytest.fixture(scope="module")
def trained(method, patched, fresh) -> nn.Module:
    """The same with noise in what is trained, as if it had learnt something; not to be changed."""
    model = copy.deepcopy(fresh)
    if method.kind != "full":
        std = 0.2 if method.kind == "weights" else 0.5
        generator = torch.Generator().manual_seed(1)
        own = {f"base_model.model.{name}" for name, _ in patched.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = std * torch.randn(parameter.shape, generator=generator)
                    # what the base has itself has a size that it depends on
                    parameter.copy_(parameter + noise if name in own else noise)
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

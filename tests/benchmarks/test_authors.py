"""The state methods as their authors released them compute what ours do, so that their times can be compared."""

from dataclasses import replace

import pytest
import torch

from benchmarks.peers.authors_mixer import AuthorsMixer
from benchmarks.peers.authors_scan import SCANS
from benchmarks.step_cases import StepCase, StepSpec, forget_models
from ssmtune.measure.inputs import Shape, make_inputs
from ssmtune.ops import selective_scan

SPEC = StepSpec("authors", "state-offset", 2, 12, layers=2, width=16, vocabulary=32, dstate=4)


@pytest.fixture(autouse=True)
def _own_models():
    yield
    forget_models()


@pytest.mark.parametrize("shape", [Shape(2, 6, 9, 4), Shape(1, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("method", SCANS)
def test_scan_equals_ours_in_value_and_every_gradient(method, shape, assert_close):
    inputs = make_inputs(shape).to(torch.float64)
    name = method.replace("-", "_")
    values = {key: value for key, value in inputs.arguments().items() if key not in ("delta_bias", "delta")}
    others = {"initial_state", "state_offset"} - {name}
    values = {key: value for key, value in values.items() if key not in others}
    values["delta"] = torch.nn.functional.softplus(inputs.delta)
    results = []
    for scan in (selective_scan, lambda **given: SCANS[method](selective_scan, **given)):
        leaves = {key: value.detach().requires_grad_() for key, value in values.items()}
        out = scan(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
        results.append({"out": out, **dict(zip(leaves, grads, strict=True))})
    for key, expected in results[0].items():
        assert_close(key, expected, results[1][key], 1e-12)


@pytest.mark.parametrize("method", SCANS)
def test_model_equals_ours_in_loss_and_the_gradient_of_its_states(method, assert_close):
    theirs = StepCase(replace(SPEC, method=method), torch.float64)
    ours = StepCase(replace(SPEC, method=method, backend="reference"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    states = [value for value in theirs.model.parameters() if value.requires_grad]
    adapters = [value for value in ours.model.parameters() if value.requires_grad]
    assert [value.shape for value in states] == [value.shape for value in adapters]
    with torch.no_grad():
        for state, adapter in zip(states, adapters, strict=True):
            adapter.copy_(torch.randn(state.shape, generator=generator))
            state.copy_(adapter)
    expected, actual = (case.values()[0] for case in (ours, theirs))
    assert_close("logits", expected.pop("out"), actual.pop("out"), 1e-10)
    for mine, (name, gradient) in zip(expected.values(), actual.items(), strict=True):
        assert_close(name, mine, gradient, 1e-6 if mine.dtype == torch.float32 else 1e-10)


def test_every_mixer_and_nothing_else_trains():
    model = StepCase(SPEC).model
    assert sum(isinstance(module, AuthorsMixer) for module in model.modules()) == SPEC.layers
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == SPEC.layers and all(name.endswith("authors_state") for name in trained)

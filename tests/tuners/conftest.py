"""Pieces the tuner tests share."""

import pytest
import torch

from ssmtune.tuners import AdditionalScanConfig, InitialStateConfig, StateOffsetConfig

VARIANTS = {
    "offset-h": lambda **kwargs: StateOffsetConfig(**kwargs),
    "offset-y": lambda **kwargs: StateOffsetConfig(target="y", **kwargs),
    "offset-rank2": lambda **kwargs: StateOffsetConfig(rank=2, **kwargs),
    "initial": lambda **kwargs: InitialStateConfig(**kwargs),
    "initial-conv": lambda **kwargs: InitialStateConfig(conv_state=True, **kwargs),
    "initial-rank2": lambda **kwargs: InitialStateConfig(rank=2, alpha=4, **kwargs),
    "additional": lambda **kwargs: AdditionalScanConfig(states=3, **kwargs),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def make_config(request):
    """Every variant of every method that adds to mixers, as a function of the config fields they share."""
    return request.param


@pytest.fixture(params=[name for name in VARIANTS if name != "additional"])
def make_state_config(request):
    """As `make_config`, for the two methods whose adapters can be summed."""
    return VARIANTS[request.param]


@pytest.fixture(params=[name for name in VARIANTS if name not in ("initial-conv", "additional")])
def make_scan_config(request):
    """As `make_config`, without those that do more than add to the states of a scan."""
    return VARIANTS[request.param]


@pytest.fixture
def make_nonzero():
    """Fill the trainable tensors of a model with noise large enough to change what it predicts."""

    def fill(model, seed=1, std=1.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        return model

    return fill


@pytest.fixture
def logits():
    def run(model, input_ids, **kwargs):
        with torch.no_grad():
            return model(input_ids=input_ids, **kwargs).logits

    return run


@pytest.fixture
def input_ids():
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))

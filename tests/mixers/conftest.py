import copy

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from ssmtune.mixers import StateAdapter, StateInputs, find_mixers, patch


@pytest.fixture
def make_mamba():
    """A factory of random models: every parameter, biases too, is large enough to matter."""

    def make(**changes) -> MambaForCausalLM:
        config = MambaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "state_size": 8,
                "num_hidden_layers": 2,
                "time_step_rank": 4,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": None,
                **changes,
            }
        )
        torch.manual_seed(0)
        model = MambaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("_proj.bias", "conv1d.bias", "mixer.D", "A_log")):
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif name.endswith("_proj.weight"):
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        return model.eval()

    return make


@pytest.fixture
def make_pair(make_mamba):
    """A factory of two equal models, transformers' own and a patched one."""

    def make(**changes) -> tuple[MambaForCausalLM, MambaForCausalLM]:
        ours = make_mamba(**changes)
        theirs = copy.deepcopy(ours)
        patch(ours)
        return theirs, ours

    return make


class Additions(StateAdapter):
    """The simplest adapter: whichever of the four inputs it is made with, as parameters."""

    def __init__(self, **tensors):
        super().__init__()
        self.tensors = nn.ParameterDict(tensors)
        self.enabled = True

    def state_inputs(self) -> StateInputs:
        return StateInputs(**self.tensors) if self.enabled else StateInputs()


@pytest.fixture
def adapt():
    """A function that gives every mixer a random adapter with the inputs asked for."""

    def adapt(model, *kinds: str, name: str = "additions") -> list[Additions]:
        adapters = []
        for index, (_, mixer) in enumerate(find_mixers(model)):
            generator = torch.Generator().manual_seed(index)
            dim, dstate = mixer.intermediate_size, mixer.ssm_state_size
            shapes = {"initial_state": (dim, dstate), "state_offset": (dim, dstate), "output_offset": (dim,)}
            shapes["conv_state"] = (dim, mixer.conv_kernel_size - 1)
            adapter = Additions(**{kind: torch.randn(shapes[kind], generator=generator) for kind in kinds})
            mixer.add_module(name, adapter)
            adapters.append(adapter)
        return adapters

    return adapt


@pytest.fixture
def tokens():
    """A function that draws random tokens (batch, seqlen), none of them the pad."""

    def draw(batch: int, seqlen: int) -> torch.Tensor:
        return torch.randint(3, 64, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))

    return draw

"""Falcon-H1 and Qwen3.5 mixers of transformers 5 as the package s0-tuning 0.1.2 expects them.

Of Falcon-H1 s0-tuning wraps the method `cuda_kernels_forward` of each mixer, and while that runs puts functions that
start from the learned state in the place of two kernels of mamba_ssm, which it looks for among the globals of the
method's module. transformers 5 has neither the method nor these names. Both are here: the forward pass of transformers,
line by line, with its scan called by the name that s0-tuning replaces. Of Qwen3.5 it replaces the attribute
`chunk_gated_delta_rule` of each mixer, which transformers 5 never looks at; here it does.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

mamba_split_conv1d_scan_combined = None
mamba_chunk_scan_combined = modeling_falcon_h1.mamba2_chunk_scan


def _scan(*args: Any, **kwargs: Any) -> Any:
    return mamba_chunk_scan_combined(*args, **kwargs)


def _forward_with(mixer_class: type[nn.Module], module: ModuleType, **functions: Callable[..., Any]) -> Callable:
    """The forward pass of a mixer class of a module with functions of that module replaced."""
    forward = inspect.unwrap(mixer_class.forward)
    return FunctionType(forward.__code__, vars(module) | functions, argdefs=forward.__defaults__)


_falcon_forward = _forward_with(FalconH1Mixer, modeling_falcon_h1, mamba2_chunk_scan=_scan)


class S0Mixer(FalconH1Mixer):
    """transformers' mixer with the method that s0-tuning wraps."""

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **kwargs) -> Tensor:
        return self.cuda_kernels_forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask)

    def cuda_kernels_forward(
        self, hidden_states: Tensor, cache_params=None, cache_position=None, attention_mask=None
    ) -> Tensor:
        return _falcon_forward(self, hidden_states, cache_params, attention_mask)


class S0DeltaNet(Qwen3_5GatedDeltaNet):
    """transformers' mixer that calls what s0-tuning replaces."""

    chunk_gated_delta_rule = staticmethod(modeling_qwen3_5.torch_chunk_gated_delta_rule)

    def forward(self, *args, **kwargs) -> Tensor:
        rule = self.chunk_gated_delta_rule
        forward = _forward_with(Qwen3_5GatedDeltaNet, modeling_qwen3_5, torch_chunk_gated_delta_rule=rule)
        return forward(self, *args, **kwargs)


def use_s0_mixers(model: nn.Module) -> nn.Module:
    """Give the mixers of a Falcon-H1 or Qwen3.5 what s0-tuning looks for."""
    for module in model.modules():
        for known, ours in ((FalconH1Mixer, S0Mixer), (Qwen3_5GatedDeltaNet, S0DeltaNet)):
            if type(module) is known:
                module.__class__ = ours
    return model

"""Falcon-H1 mixers of transformers 5 as the package s0-tuning 0.1.2 expects them.

s0-tuning wraps the method `cuda_kernels_forward` of each mixer, and while that runs puts functions that start from the
learned state in the place of two kernels of mamba_ssm, which it looks for among the globals of the method's module.
transformers 5 has neither the method nor these names. Both are here: the forward pass of transformers, line by line,
with its scan called by the name that s0-tuning replaces.
"""

import inspect
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

mamba_split_conv1d_scan_combined = None
mamba_chunk_scan_combined = modeling_falcon_h1.mamba2_chunk_scan


def _scan(*args: Any, **kwargs: Any) -> Any:
    return mamba_chunk_scan_combined(*args, **kwargs)


_theirs = inspect.unwrap(FalconH1Mixer.forward)
_forward = FunctionType(_theirs.__code__, vars(modeling_falcon_h1) | {"mamba2_chunk_scan": _scan})
_forward.__defaults__ = _theirs.__defaults__


class S0Mixer(FalconH1Mixer):
    """transformers' mixer with the method that s0-tuning wraps."""

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **kwargs) -> Tensor:
        return self.cuda_kernels_forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask)

    def cuda_kernels_forward(
        self, hidden_states: Tensor, cache_params=None, cache_position=None, attention_mask=None
    ) -> Tensor:
        return _forward(self, hidden_states, cache_params, attention_mask)


def use_s0_mixers(model: nn.Module) -> nn.Module:
    """Give the Falcon-H1 mixers of a model the method."""
    for module in model.modules():
        if type(module) is FalconH1Mixer:
            module.__class__ = S0Mixer
    return model

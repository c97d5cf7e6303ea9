"""What the mixers of state-spaces' mamba_ssm have of their own: their names of sizes, and the caches of their package.

There a cache is the dict `inference_params.key_value_memory_dict`: by layer, the last inputs of the convolution and the
recurrent state, which are written in place, and which hold of earlier tokens what `seqlen_offset` says.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from .selective_mixer import SelectiveMixer


class InferenceParamsMixer(SelectiveMixer):
    """A mixer of mamba_ssm on the operators of ssmtune.

    Unlike there, several tokens can go on from a cache, and the states that it allocates are float32.
    """

    hidden_size = property(attrgetter("d_model"))
    conv_kernel_size = property(attrgetter("d_conv"))
    ssm_state_size = property(attrgetter("d_state"))

    def forward(self, hidden_states: Tensor, inference_params: Any | None = None) -> Tensor:
        return self.mix_sequences(hidden_states, inference_params)

    def mix_sequences(
        self, hidden_states: Tensor, inference_params: Any | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Run the mixer as `mix` does, from and into the states of `inference_params`.

        Raises:
            ValueError: there is a cache, but no layer_idx, or packed sequences.
        """
        if inference_params is None:
            return self.mix(hidden_states, None, cu_seqlens)
        if self.layer_idx is None:
            raise ValueError(
                f"{type(self).__name__} got inference_params, but its layer_idx is None.\n"
                "  States are kept by layer. Make the mixer with a layer_idx of its own."
            )
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(len(hidden_states), inference_params.max_seqlen)
        cache = MixerCache(*memory[self.layer_idx], self.layer_idx, inference_params.seqlen_offset > 0)
        out = self.mix(hidden_states, cache, cu_seqlens)
        memory[self.layer_idx] = cache.states
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go on from states, which are overwritten, by the tokens (batch, seqlen, hidden_size)."""
        cache = MixerCache(conv_state, ssm_state, self.layer_idx, True)
        return self.mix(hidden_states, cache, None), *cache.states

    def allocate_inference_cache(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        conv_state, ssm_state = super().allocate_inference_cache(*args, **kwargs)
        return conv_state, ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32))


class MixerCache:
    """The states of one mixer, as the transformers cache that `SelectiveMixer` reads and writes.

    Args:
        conv_state: (batch, channels, width). The last inputs of the convolution, overwritten.
        ssm_state: (batch, ..., dstate). The recurrent state, overwritten.
        layer_idx: the mixer's.
        continued: whether they are those of tokens before; otherwise what they hold is not looked at.
    """

    def __init__(self, conv_state: Tensor, ssm_state: Tensor, layer_idx: int | None, continued: bool):
        layer = LinearAttentionLayer()
        layer.conv_states[0], layer.recurrent_states[0] = conv_state, ssm_state
        layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
        layer.conv_kernel_size[0] = conv_state.shape[-1]
        layer.has_previous_state[0] = continued
        self.layers = {layer_idx: layer}

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """The tensors given, or those in their place where these could not be written, as of a past inference mode."""
        (layer,) = self.layers.values()
        return layer.conv_states[0], layer.recurrent_states[0]

    def update_conv_state(self, conv_state: Tensor, layer_idx: int | None, **kwargs: Any) -> None:
        self.layers[layer_idx].update_conv_state(conv_state, **kwargs)

    def update_recurrent_state(self, ssm_state: Tensor, layer_idx: int | None) -> None:
        self.layers[layer_idx].update_recurrent_state(ssm_state)

"""A transformers Mamba whose scan is the linear-time PyTorch loop instead of its own, quadratic in training."""

import torch
from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaMixer, causal_conv1d_fn

from ssmtune.measure.peers.unbind_loop import scan


class UnbindMixer(MambaMixer):
    """transformers' mixer, in training only, around `unbind_loop.scan`."""

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **kwargs) -> Tensor:
        projected = self.in_proj(hidden_states).transpose(1, 2)
        u, z = projected.chunk(2, dim=1)
        u = causal_conv1d_fn(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        time_step, B, C = (part.transpose(1, 2) for part in self.x_proj(u.transpose(1, 2)).split(sizes, dim=-1))
        delta = self.dt_proj.weight @ time_step
        out = scan(u, delta, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias)
        return self.out_proj(out.transpose(1, 2))


def use_unbind_loop(model: nn.Module) -> None:
    """Put the loop into every mixer of this model."""
    for module in model.modules():
        if type(module) is MambaMixer:
            module.__class__ = UnbindMixer

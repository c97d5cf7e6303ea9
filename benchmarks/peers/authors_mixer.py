"""A transformers Mamba tuned by its state as the authors of State-offset Tuning released it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaMixer

from benchmarks.peers.authors_scan import SCANS, Scan
from ssmtune.measure.peers import mamba_ssm_scan


class AuthorsMixer(MambaMixer):
    """transformers' mixer, in training only: convolution and time step in PyTorch, `authors_scan` around the scan."""

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **kwargs) -> Tensor:
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        u = self.act(self.conv1d(x)[..., : x.shape[2]])
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.x_proj(u.transpose(1, 2)).split(sizes, dim=-1)
        delta = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        D = self.D.to(A.dtype)
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        out = SCANS[self.authors_method](self.authors_base, u, delta, A, B, C, D, z, self.authors_state)
        return self.out_proj(out.transpose(1, 2))


def base_scan() -> Scan:
    """mamba_ssm's kernel, as released, or ssmtune's plain scan where that is not installed."""
    if torch.cuda.is_available() and mamba_ssm_scan.why_not() is None:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn
    from ssmtune.ops import selective_scan

    return selective_scan


def use_authors_way(model: nn.Module, method: str) -> nn.Module:
    """Freeze a model and give every mixer a state of its dtype, at zero, that trains by a method of `SCANS`."""
    model.requires_grad_(False)
    scan = base_scan()
    for module in model.modules():
        if type(module) is MambaMixer:
            module.__class__ = AuthorsMixer
            module.authors_method, module.authors_base = method, scan
            weight = module.in_proj.weight
            module.authors_state = nn.Parameter(weight.new_zeros(module.intermediate_size, module.ssm_state_size))
    return model

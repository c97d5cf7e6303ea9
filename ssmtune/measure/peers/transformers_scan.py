"""transformers' own selective scan: a PyTorch loop over time, its path without further packages."""

import inspect
from importlib.util import find_spec

from torch import Tensor


def why_not() -> str | None:
    """None where transformers has `mamba_selective_scan`, else the reason."""
    if not find_spec("transformers"):
        return "transformers is not installed (pip install transformers)"
    from transformers.models.mamba import modeling_mamba

    if not hasattr(modeling_mamba, "mamba_selective_scan"):
        return "this version of transformers has no mamba_selective_scan (pip install 'transformers>=5.23')"
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """transformers' sequential scan. Its backward pass is quadratic in seqlen: it indexes every step of one tensor."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns once that it is slow, which is what is measured here
    # where mamba_ssm is installed, the name stands for that package's kernel
    return inspect.unwrap(mamba_selective_scan)(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)

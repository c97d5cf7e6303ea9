"""mamba_ssm's CUDA kernel, where it is installed."""

from torch import Tensor


def why_not() -> str | None:
    """None where mamba_ssm can be imported, else the reason."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except ImportError as error:
        return f"mamba_ssm cannot be imported ({error})"
    return None


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """The fused kernel of the Mamba authors."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)

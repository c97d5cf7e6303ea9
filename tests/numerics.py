"""How tests compare numbers."""

from torch import Tensor


def error_ratio(expected: Tensor, actual: Tensor) -> float:
    """Return the root-mean-square error relative to the root mean square of the expected values."""
    if expected.numel() == 0:
        return 0.0
    expected, actual = expected.detach().double(), actual.detach().double()
    error = (actual - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt()
    return (error / scale.clamp_min(1e-30)).item() if error > 0 else 0.0


def assert_close(name: str, expected: Tensor, actual: Tensor, ratio: float) -> None:
    """Check shape, absence of NaN, and that `error_ratio` is at most `ratio`; prints the comparison."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert not expected.isnan().any(), f"{name}: NaN in the expected values"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    error = error_ratio(expected, actual)
    difference = max((actual.detach().double() - expected.detach().double()).abs().flatten().tolist(), default=0.0)
    print(f"{name:<20} diff {difference:.3e} ratio {error:.3e} (at most {ratio:.3e})")
    assert error <= ratio, f"{name}: error ratio {error:.3e} is above {ratio:.3e}, largest difference {difference:.3e}"

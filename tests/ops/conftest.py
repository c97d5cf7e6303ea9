"""Inputs of the operators, in every layout, and the backends they run on."""

import os
from collections.abc import Callable

import emulated_cuda
import numpy as np
import pytest
import torch
from torch import Tensor

from ssmtune import native
from ssmtune.ops import backends

SEQUENCES = ("u", "delta", "B", "C", "z")


@pytest.fixture(params=["reference", "cpu", "triton", "cuda-emulated"])
def backend(request, monkeypatch) -> str:
    """Each backend that runs tensors on the CPU here."""
    if request.param == "cpu":
        request.getfixturevalue("native_kernels")
    elif request.param == "triton":
        request.getfixturevalue("triton_interpreter")
        # so that few steps cross the bounds of chunks
        monkeypatch.setattr("ssmtune.triton_kernels.selective_scan.CHUNK_SIZE", 4)
    elif request.param == "cuda-emulated":
        monkeypatch.setitem(backends.BACKENDS, request.param, emulated_cuda.backend())
    return request.param


@pytest.fixture
def sizes(backend) -> tuple[int, int, int, int]:
    """batch, dim, seqlen, dstate of a scan over three chunks: few steps where an interpreter takes its time."""
    return (2, 5, 9, 4) if backend == "triton" else (2, 20, 70, 8)


@pytest.fixture
def native_kernels() -> None:
    """Skip where the compiled kernels are not there."""
    if not native.is_loaded():
        pytest.skip(f"compiled kernels: {native.why_not()}")


@pytest.fixture
def triton_interpreter(monkeypatch) -> None:
    """Skip where Triton's kernels do not run on the CPU; bfloat16 is rounded as a GPU does it, not cut off."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off where there is a GPU")
    from triton.runtime import interpreter

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if {str(source), str(target)} != dtypes.keys():
            return convert(data, source, target, rounding_mode)
        values = torch.from_numpy(np.ascontiguousarray(data)).view(dtypes[str(source)]).to(dtypes[str(target)])
        return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def triton_chunks_of_8(triton_interpreter, monkeypatch):
    """Chunks of two tiles of 4 steps in Triton's kernels of Mamba-2's scan, so that few steps cross their bounds."""
    launches = pytest.importorskip("ssmtune.triton_kernels.ssd_scan_launches")
    monkeypatch.setattr(launches, "CHUNK_SIZE", 8)
    monkeypatch.setattr(launches, "TILE", 8)
    return launches


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout: first, last, row-strided first or last, or dense nowhere.

    The axes between the first and the last count as one, as in a view of what a projection produces: (batch, groups,
    dstate, seqlen) is laid out as (batch, groups * dstate, seqlen).
    """
    shape = x.shape
    x = x.flatten(1, -2)
    batch, dim, seqlen = x.shape
    if layout == "last":
        target = x.new_zeros(batch, seqlen, dim).transpose(1, 2)
    elif layout == "last-strided":
        target = x.new_zeros(batch, seqlen, dim + 3)[:, :, 1:-2].transpose(1, 2)
    elif layout == "first-strided":
        target = x.new_zeros(batch, dim, seqlen + 3)[:, :, 1:-2]
    elif layout == "odd":
        target = x.new_zeros(batch, 2 * dim, 3 * seqlen)[:, ::2, ::3]
    else:
        target = x.new_zeros(batch, dim, seqlen)
    return target.copy_(x).unflatten(1, shape[1:-1])


@pytest.fixture(scope="session")
def scan_inputs() -> Callable[..., dict[str, Tensor]]:
    """A factory of the tensors of a scan.

    `optional` names the optional tensors to make, `per_row` those with a row of their own for each of `rows` sequences,
    by default the batch; `groups` of B and C give them an axis more. Without `delta_softplus` the steps are positive
    already.
    """

    def make(
        batch: int,
        dim: int,
        seqlen: int,
        dstate: int,
        *,
        optional=("D", "z", "delta_bias", "initial_state", "state_offset", "output_offset"),
        per_row=(),
        rows: int | None = None,
        groups: int | None = None,
        layouts=None,
        delta_softplus: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        def maybe_per_row(name: str, *shape: int) -> Tensor:
            return normal(rows or batch, *shape) if name in per_row else normal(*shape)

        values = {
            "u": normal(batch, dim, seqlen),
            "delta": 0.5 * normal(batch, dim, seqlen) - 1,
            "A": -torch.exp(0.5 * normal(dim, dstate)),
            "B": normal(batch, *((groups,) if groups else ()), dstate, seqlen),
            "C": normal(batch, *((groups,) if groups else ()), dstate, seqlen),
            "D": normal(dim),
            "z": normal(batch, dim, seqlen),
            "delta_bias": 0.5 * normal(dim),
            "initial_state": maybe_per_row("initial_state", dim, dstate),
            "state_offset": maybe_per_row("state_offset", dim, dstate),
            "output_offset": maybe_per_row("output_offset", dim),
        }
        if not delta_softplus:
            values["delta"] = values["delta"].exp()
            values["delta_bias"] = values["delta_bias"].abs()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: lay_out(value.to(dtype), (layouts or {}).get(name, "last")) if name in SEQUENCES else value.to(wide)
            for name, value in values.items()
            if name in ("u", "delta", "A", "B", "C") or name in optional
        }

    return make

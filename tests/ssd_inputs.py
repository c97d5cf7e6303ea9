"""Inputs of Mamba-2's scan, how tests run it, and the recurrence that they hold it to."""

import math

import torch
from numerics import assert_close
from torch import Tensor

from ssmtune.ops import ssd_scan

OPTIONAL = ("D", "z", "dt_bias", "initial_states", "state_offset", "output_offset")
SEQUENCES = ("x", "dt", "B", "C", "z")


def draw(
    batch: int,
    seqlen: int,
    heads: int,
    headdim: int,
    groups: int,
    dstate: int,
    *,
    optional=OPTIONAL,
    per_row: bool = False,
    rows: int | None = None,
    dt_softplus: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random tensors of a scan; with `per_row` states and offsets are of each of `rows` sequences, else shared.

    There are as many rows as the batch has by default. Without `dt_softplus` the steps are positive already.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    row = (rows or batch,) if per_row else ()
    values = {
        "x": normal(batch, seqlen, heads, headdim),
        "dt": 0.5 * normal(batch, seqlen, heads) - 1,
        "A": -torch.exp(0.5 * normal(heads)),
        "B": normal(batch, seqlen, groups, dstate),
        "C": normal(batch, seqlen, groups, dstate),
        "D": normal(heads, headdim) if per_row else normal(heads),
        "z": normal(batch, seqlen, heads, headdim),
        "dt_bias": 0.5 * normal(heads),
        "initial_states": normal(*row, heads, headdim, dstate),
        "state_offset": normal(*row, heads, headdim, dstate),
        "output_offset": normal(*row, heads, headdim),
    }
    if not dt_softplus:
        values["dt"], values["dt_bias"] = values["dt"].exp(), values["dt_bias"].abs()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: value.to(dtype if name in SEQUENCES else wide)
        for name, value in values.items()
        if name not in OPTIONAL or name in optional
    }


def run(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """The output and the final states, by default with softplus."""
    return ssd_scan(**inputs, **{"dt_softplus": True, "return_final_states": True} | options)


def tolerance(dtype: torch.dtype) -> float:
    """How far results may be from the exact ones: some roundings of the type."""
    return {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def recurrence(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, state_offset=None, output_offset=None,
               dt_softplus=True, dt_limit=(0.0, math.inf)):  # fmt: skip
    """The definition, one step of one head's states at a time."""
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) + (0 if initial_states is None else initial_states)
    out = []
    for t in range(x.shape[1]):
        inflow = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        h = (dt[:, t] * A).exp()[..., None, None] * h + inflow
        out.append(((h + (0 if state_offset is None else state_offset)) * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(out, dim=1)
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    if output_offset is not None:
        y = y + (output_offset if output_offset.dim() == 2 else output_offset[:, None])
    return (y if z is None else y * torch.nn.functional.silu(z)), h


def compare(inputs, backend, dtype=torch.float32, **options):
    """Hold outputs, final states and every gradient of a backend to the recurrence in float64."""
    wide = {name: x.double().requires_grad_() for name, x in inputs.items()}
    narrow = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    expected = recurrence(**wide, **options)
    actual = run(narrow, backend=backend, **options)
    ratio = tolerance(dtype)
    for name, a, b in zip(("out", "final_states"), expected, actual, strict=True):
        assert_close(name, a, b, ratio)
    weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1), dtype=r.dtype) for r in expected]
    weights = [weight.to(result.device) for weight, result in zip(weights, expected, strict=True)]
    a = torch.autograd.grad(sum((r * w).sum() for r, w in zip(expected, weights, strict=True)), list(wide.values()))
    b = torch.autograd.grad(
        sum((r * w.to(dtype).to(r.dtype)).sum() for r, w in zip(actual, weights, strict=True)), list(narrow.values())
    )
    for name, x, y in zip(inputs, a, b, strict=True):
        assert y.dtype == inputs[name].dtype, name
        assert_close(f"d{name}", x, y, 4 * ratio)


def compare_packed(inputs, backend, cu_seqlens):
    """Hold outputs, final states and every gradient of packed sequences to the reference in float64."""
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
        out, states = run(leaves, backend=name, cu_seqlens=cu_seqlens)
        gradients = torch.autograd.grad(out.square().sum() + states.sum(), list(leaves.values()))
        results.append((out, states, *gradients))
    for name, a, b in zip(("out", "states", *inputs), *results, strict=True):
        assert_close(name, a, b, 4 * tolerance(torch.float32))

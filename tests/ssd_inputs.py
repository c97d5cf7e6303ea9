"""Inputs of Mamba-2's scan, and how tests run it."""

import torch
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

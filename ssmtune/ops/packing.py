"""Sequences of different lengths packed one after the other along seqlen.

`cu_seqlens` holds where each sequence starts and, last, where the last one ends: [0, 5, 12] are sequences of 5 and of
7 steps.
"""

import torch
from torch import Tensor

from ssmtune.ops.arguments import check_integers


def check_cu_seqlens(op: str, main: str, cu_seqlens: Tensor, batch: int, seqlen: int, device: torch.device) -> None:
    """Check `cu_seqlens` against the tensor named `main`; its values only on the CPU.

    To read them from a GPU would wait for it on every call, and a compiled graph cannot read them at all: there whoever
    loops over the sequences checks them.
    """
    check_integers(op, main, "cu_seqlens", cu_seqlens, device, "Its values are positions along seqlen.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n_sequences + 1,), 2 values or more.\n"
            "  It holds where each sequence starts and where the last one ends. Pass [0, seqlen] for a single one."
        )
    if batch != 1:
        raise ValueError(
            f"{op}: cu_seqlens was given, but {main} has batch {batch}, expected 1.\n"
            "  Packed sequences follow each other in one row. Join the rows along seqlen and leave out their padding."
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        sequence_bounds(op, cu_seqlens, seqlen)


def sequence_bounds(op: str, cu_seqlens: Tensor, seqlen: int) -> list[int]:
    """Read `cu_seqlens` and check its values.

    Raises:
        ValueError: it does not cut seqlen into sequences that are not empty.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(
            f"{op}: cu_seqlens starts with {bounds[0]}, expected 0.\n"
            "  It holds where each sequence starts, the first at 0. Put a 0 before the cumulative sum of the lengths."
        )
    for i in range(1, len(bounds)):
        if bounds[i] <= bounds[i - 1]:
            raise ValueError(
                f"{op}: cu_seqlens holds {bounds[i - 1]} and then {bounds[i]} (values {i - 1} and {i}), so sequence "
                f"{i - 1} has no steps.\n"
                "  It must increase from each value to the next. Leave out sequences that are empty."
            )
    if bounds[-1] != seqlen:
        raise ValueError(
            f"{op}: cu_seqlens ends with {bounds[-1]}, expected seqlen = {seqlen}.\n"
            "  Every step belongs to a sequence. Pass padding at the end as a sequence of its own, or cut it off."
        )
    return bounds


def n_kept_states(seqlen: int, n_sequences: int | None, chunk_size: int) -> int:
    """Count the states kept between chunks: n steps have (n - 1) // chunk_size, several sequences at most this many."""
    return (seqlen - (1 if n_sequences is None else n_sequences)) // chunk_size

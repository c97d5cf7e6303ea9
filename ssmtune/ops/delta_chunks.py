"""The gated delta rule a chunk of steps at a time.

In a chunk that starts from the state S, with c_t = exp(g_1 + ... + g_t) and D_tj = exp(g_{j+1} + ... + g_t), step t
writes u_t at its key:

    u_t = beta_t (v_t - (c_t * k_t)^T S - sum_{j<t} k_t^T (D_tj * k_j) u_j)
    o_t = (c_t * q_t)^T S + sum_{j<=t} q_t^T (D_tj * k_j) u_j
    S'  = c_T * S + sum_j (D_Tj * k_j) u_j^T

The first line is a triangular system. It is solved for v, and for what stands before S, of all chunks at once; only S'
goes from chunk to chunk. (Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, section 3.3.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64
# D holds a number for each channel where channels decay by themselves.
CHUNK_SIZE_OF_CHANNELS = 16


def scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run the rule over sequences of these lengths, which follow each other in every row.

    Args:
        q: (batch, seqlen, heads, kdim).
        k: (batch, seqlen, heads, kdim).
        v: (batch, seqlen, heads, vdim).
        g: (batch, seqlen, heads, 1 or kdim).
        beta: (batch, seqlen, heads, 1).
        initial_state: (batch * n_sequences, heads, kdim, vdim); either batch or n_sequences is 1.
        lengths: (n_sequences,).

    Returns:
        o (batch, seqlen, heads, vdim), and the final states, as initial_state.
    """
    size = min(CHUNK_SIZE if g.shape[-1] == 1 else CHUNK_SIZE_OF_CHANNELS, max(lengths))
    q, k, v, g, beta = (_cut(x, lengths, size) for x in (q, k, v, g, beta))
    between, since = _decays_between(g), g.cumsum(-2).exp()
    system = beta * _products(k, k, between)
    right = torch.cat([beta * v, beta * since * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, held = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    reading = torch.cat([held, since * q], dim=-2)
    keys, kept = (between[..., -1, :, :] * k).mT, since[..., -1, :].unsqueeze(-1)

    chunks = zip(*(x.unbind(2) for x in (written, reading, keys, kept)), strict=True)
    updates, outputs, final_states = [], [], []
    for length, state in zip(lengths, initial_state.split(q.shape[0]), strict=True):
        for _ in range(0, length, size):
            new, rows, at, decay = next(chunks)
            found, out = (rows @ state).split(size, dim=-2)
            updates.append(new - found)
            outputs.append(out)
            state = decay * state + at @ updates[-1]
        final_states.append(state)
    out = torch.stack(outputs, 2) + _products(q, k, between) @ torch.stack(updates, 2)
    return _join(out, lengths, size), _concatenate(final_states, 0)


def add_offsets(
    out: Tensor, q: Tensor, state_offset: Tensor | None, output_offset: Tensor | None, lengths: Sequence[int]
) -> Tensor:
    """Add to the output what the queries read of an offset of the state, and an offset of the output.

    Args:
        out: (batch, seqlen, heads, vdim).
        q: (batch, seqlen, heads, kdim).
        state_offset: ([batch * n_sequences,] heads, kdim, vdim).
        output_offset: ([batch * n_sequences,] heads, vdim).
        lengths: (n_sequences,).
    """
    batch, rows = out.shape[0], out.shape[0] * len(lengths)
    if state_offset is not None:
        offsets = state_offset.expand(rows, -1, -1, -1).split(batch)
        pieces = zip(q.transpose(1, 2).split(list(lengths), dim=2), offsets, strict=True)
        out = out + _concatenate([piece @ offset for piece, offset in pieces], 2).transpose(1, 2)
    if output_offset is not None:
        offsets = output_offset.expand(rows, -1, -1).unsqueeze(1).split(batch)
        pieces = zip(out.split(list(lengths), dim=1), offsets, strict=True)
        out = _concatenate([piece + offset for piece, offset in pieces], 1)
    return out


def _cut(x: Tensor, lengths: Sequence[int], size: int) -> Tensor:
    """(batch, seqlen, heads, n) to (batch, heads, chunks, size, n); a sequence ends with steps that change nothing."""
    sequences = x.transpose(1, 2).split(list(lengths), dim=2)
    missing = [-length % size for length in lengths]
    filled = [F.pad(x, (0, 0, 0, steps)) if steps else x for x, steps in zip(sequences, missing, strict=True)]
    return _concatenate(filled, 2).unflatten(2, (-1, size))


def _join(x: Tensor, lengths: Sequence[int], size: int) -> Tensor:
    """The reverse of `_cut`."""
    sequences = x.flatten(2, 3).split([length + -length % size for length in lengths], dim=2)
    cut = [sequence[:, :, :length] for sequence, length in zip(sequences, lengths, strict=True)]
    return _concatenate(cut, 2).transpose(1, 2)


def _concatenate(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without its copy of a single tensor."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def _decays_between(g: Tensor) -> Tensor:
    """D (..., size, size, n) of g (..., size, n), zero above the diagonal.

    Sums are taken from each j on: a difference of sums from the start is wrong after a step that forgets everything.
    """
    pairs = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device)
    after = torch.where(pairs.tril(-1).unsqueeze(-1), g.unsqueeze(-2), 0.0)
    return after.cumsum(-3).masked_fill(pairs.triu(1).unsqueeze(-1), -torch.inf).exp()


def _products(x: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """x_t^T (D_tj * k_j), (..., size, size)."""
    if between.shape[-1] == 1:
        return (x @ k.mT) * between.squeeze(-1)
    return ((between * k.unsqueeze(-3)) @ x.unsqueeze(-1)).squeeze(-1)

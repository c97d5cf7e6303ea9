"""The launches of Mamba-2's scan on Triton: how the work of a call is laid out over programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ssmtune.triton_kernels.selective_scan import multiprocessors
from ssmtune.triton_kernels.ssd_scan_decays import ssd_decays_kernel, ssd_offsets_kernel
from ssmtune.triton_kernels.ssd_scan_products import ssd_products_kernel
from ssmtune.triton_kernels.ssd_scan_states import ssd_carry_kernel, ssd_states_kernel
from ssmtune.triton_kernels.ssd_scan_steps import ssd_steps_bwd_kernel, ssd_steps_kernel

# steps between the states that are kept: of half as many, the states would be twice as large and read twice as often
CHUNK_SIZE = 128
# the side of the tiles that products are made of, half of it where their operands are float32
TILE = 64
# heads whose steps a program computes, and elements of a state that it passes on
STEPS_HEADS, CARRY = 16, 1024


def operands(dtype: torch.dtype) -> dict[str, object]:
    """Return in which type products take their operands, and how they are multiplied, as options of kernels.

    Products of two tensors in a half type are exact either way. States, decays and their products are float32: bfloat16
    holds them with its own precision; float16 would overflow, and TF32 has its precision with the range of float32.
    """
    if knobs.runtime.interpret:
        # NumPy knows no bfloat16
        return {"OPERAND": tl.float32, "PRECISION": "ieee"}
    if dtype == torch.bfloat16:
        return {"OPERAND": tl.bfloat16, "PRECISION": "ieee"}
    if driver.active.get_current_target().backend != "cuda":
        # AMD's matrix units take float32 as it is
        return {"OPERAND": tl.float32, "PRECISION": "ieee"}
    return {"OPERAND": tl.float32, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def splits(programs: int, most: int, device: torch.device) -> int:
    """Return in how many parts the work of each program is cut where these would leave multiprocessors idle."""
    return max(1, min(triton.cdiv(2 * multiprocessors(device), programs), most))


def n_chunks(batch: int, seqlen: int, n_sequences: int | None) -> int:
    """Return how many chunks there are of all rows, for packed sequences at most."""
    in_a_row = triton.cdiv(seqlen, CHUNK_SIZE)
    return batch * in_a_row if n_sequences is None else in_a_row + n_sequences - 1


@dataclass(frozen=True)
class ChunkedScan:
    """A call of the scan.

    Attributes:
        x to cu_seqlens: as for `ssmtune.triton_kernels.ssd_scan.ssd_scan_fwd`.
        options: dt_softplus, dt_min and dt_max.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    cu_seqlens: Tensor | None
    options: tuple[bool, float, float]

    @property
    def rows(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def chunks(self) -> int:
        return n_chunks(*self.x.shape[:2], None if self.cu_seqlens is None else self.rows)

    @property
    def group_heads(self) -> int:
        return self.x.shape[2] // self.B.shape[2]

    @property
    def ranges_of_group(self) -> int:
        """Into how many ranges of equal size the heads of a group are cut, whose shares in dB and dC are added up."""
        wanted = splits(self.chunks * (CHUNK_SIZE // self._tile) * self.B.shape[2], self.group_heads, self.x.device)
        return next(n for n in range(wanted, self.group_heads + 1) if self.group_heads % n == 0)

    @property
    def pieces_of_row(self) -> int:
        """Into how many pieces rows are cut whose shares in gradients that take no scan are added up."""
        return splits(self.x.shape[0] * self.x.shape[2], triton.cdiv(self.x.shape[1], TILE), self.x.device)

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The steps' sizes and the sums of their exponents in two floats, (chunks, nheads, CHUNK_SIZE) each."""
        results = self.dt.new_empty(3, self.chunks, self.x.shape[2], CHUNK_SIZE).unbind()
        ssd_steps_kernel[self._grid_of_steps](
            *self._inputs_of_steps, *results, *self._sizes, *self.options[1:], **self._options_of_steps
        )
        return results

    def states(
        self, x: Tensor, B: Tensor, first: Tensor | None, last: Tensor | None, states: Tensor, reverse: bool
    ) -> None:
        """Write the states before each chunk, and the last, from the first; in reverse the adjoints after each."""
        heads, headdim, dstate = states.shape[1:]
        grid, blocks = self._blocks(headdim, dstate)
        ssd_states_kernel[(self.chunks * heads * grid,)](
            x, B, *self.steps, self.cu_seqlens, states, *self._sizes, self.group_heads, *_strides(x, B),
            REVERSE=reverse, **blocks, **self._products,
        )  # fmt: skip
        ssd_carry_kernel[(self.rows * heads * triton.cdiv(headdim * dstate, CARRY),)](
            states, self.steps[1], first, last, self.cu_seqlens, self.x.shape[1], heads, _row_stride(first, 3),
            REVERSE=reverse, SIZE=headdim * dstate, CHUNK=CHUNK_SIZE, BLOCK=CARRY, num_warps=4,
        )  # fmt: skip

    def products(
        self, own: Tensor, key: Tensor, value: Tensor, states: Tensor, out: Tensor, reverse: bool,
        state_offset: Tensor | None = None, D: Tensor | None = None, output_offset: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the products of each chunk: see `ssmtune.triton_kernels.ssd_scan_products`.

        Args:
            out: (batch, seqlen, nheads, headdim) from states read by B or C; or (batch, seqlen, ranges of heads,
                dstate) from states read by x or dout.
        """
        heads, ranges = self.x.shape[2], out.shape[2]
        key_size, value_size = own.shape[3], out.shape[3]
        by_value = value is self.B or value is self.C
        block_v = _block(value_size, TILE)
        tiles = triton.cdiv(value_size, block_v) * (CHUNK_SIZE // self._tile)
        ssd_products_kernel[(self.chunks * ranges * tiles,)](
            own, key, value, *self.steps, states, state_offset, D, output_offset, self.cu_seqlens, out,
            *self._sizes, ranges, heads // ranges, heads // own.shape[2], heads // value.shape[2],
            *_strides(own, key, value), _row_stride(state_offset, 3), _row_stride(output_offset, 2),
            REVERSE=reverse, KEY_SIZE=key_size, VALUE_SIZE=value_size,
            STRIDE_KEY=value_size if by_value else 1, STRIDE_VALUE=1 if by_value else key_size,
            BLOCK_K=_block(key_size, self._tile), BLOCK_V=block_v, CHUNK=CHUNK_SIZE,
            # no registers are left for tiles of the next head beside an offset
            **self._products | ({"num_stages": 1} if by_value and state_offset is not None else {}),
        )  # fmt: skip

    def decays(self, dout: Tensor, states: Tensor, adjoints: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the steps as factors, and of the logarithms of decays, as partial sums."""
        heads, headdim, dstate = states.shape[1:]
        _, blocks = self._blocks(headdim, dstate)
        blocks |= {"BLOCK_P": _block(headdim, self._tile), "BLOCK_N": _block(dstate, 32)}
        parts = triton.cdiv(headdim, blocks["BLOCK_P"]) * (CHUNK_SIZE // self._tile)
        dsteps, ddecays = self.dt.new_empty(2, parts, self.chunks, heads, CHUNK_SIZE).unbind()
        seqlen, rows, _ = self._sizes
        ssd_decays_kernel[(self.chunks * heads * parts,)](
            self.x, dout, self.B, self.C, *self.steps, states, adjoints, self.cu_seqlens, dsteps, ddecays,
            seqlen, rows, self.chunks, heads, self.group_heads, *_strides(self.x, dout, self.B, self.C),
            **blocks, **self._products,
        )  # fmt: skip
        return dsteps, ddecays

    def steps_bwd(self, dsteps: Tensor, ddecays: Tensor, *gradients: Tensor | None) -> None:
        """Write the gradients of dt, and of A and dt_bias by chunks, from the partial sums of `decays`."""
        seqlen, rows, heads = self._sizes
        ssd_steps_bwd_kernel[self._grid_of_steps](
            *self._inputs_of_steps, dsteps, ddecays, *gradients, seqlen, rows, self.chunks, heads, *self.options[1:],
            PARTS=dsteps.shape[0], **self._options_of_steps,
        )  # fmt: skip

    def offsets_bwd(
        self, dout: Tensor, dD: Tensor | None, dstate_offset: Tensor | None, doutput_offset: Tensor | None,
        rows: int, pieces: int, cu_seqlens: Tensor | None,
    ) -> None:  # fmt: skip
        """Write the gradients that take no scan, by pieces of rows."""
        _, seqlen, heads, headdim = self.x.shape
        grid, blocks = self._blocks(headdim, 1 if dstate_offset is None else self.B.shape[3])
        del blocks["CHUNK"]
        piece = triton.cdiv(seqlen, pieces)
        ssd_offsets_kernel[(rows * pieces * heads * grid,)](
            self.x, dout, self.C, cu_seqlens, dD, dstate_offset, doutput_offset,
            seqlen, pieces, piece, heads, self.group_heads, *_strides(self.x, dout, self.C),
            **blocks, **self._products,
        )  # fmt: skip

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.x.shape[1], self.rows, self.x.shape[2]

    @property
    def _tile(self) -> int:
        return TILE if self._operands["OPERAND"] == tl.bfloat16 else TILE // 2

    @cached_property
    def _operands(self) -> dict[str, object]:
        return operands(self.x.dtype)

    @property
    def _products(self) -> dict[str, object]:
        return self._operands | {"TILE": self._tile, "num_warps": 8, "num_stages": 2}

    def _blocks(self, headdim: int, dstate: int) -> tuple[int, dict[str, int]]:
        """How many blocks a state is cut into, and the sizes of states, blocks and chunks."""
        block_p, block_n = _block(headdim, TILE), _block(dstate, TILE)
        sizes = {"HEADDIM": headdim, "DSTATE": dstate, "BLOCK_P": block_p, "BLOCK_N": block_n, "CHUNK": CHUNK_SIZE}
        return triton.cdiv(headdim, block_p) * triton.cdiv(dstate, block_n), sizes

    @property
    def _grid_of_steps(self) -> tuple[int]:
        return (self.chunks * triton.cdiv(self.x.shape[2], STEPS_HEADS),)

    @property
    def _inputs_of_steps(self) -> tuple[Tensor | None, ...]:
        return self.dt, self.A, self.dt_bias, self.cu_seqlens

    @property
    def _options_of_steps(self) -> dict[str, object]:
        return {"DT_SOFTPLUS": self.options[0], "CHUNK": CHUNK_SIZE, "BLOCK_H": STEPS_HEADS, "num_warps": 4}


def _block(size: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), most)


def _strides(*sequences: Tensor) -> Iterator[int]:
    for x in sequences:
        yield from x.stride()[:2]


def _row_stride(parameter: Tensor | None, dims: int) -> int:
    return 0 if parameter is None or parameter.dim() == dims else parameter.stride(0)

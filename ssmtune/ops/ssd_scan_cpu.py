"""Calls into the compiled CPU kernels of Mamba-2's scan.

The kernels write into tensors their caller allocated, and skip each result that is None.
"""

from torch import Tensor

from ssmtune import native
from ssmtune.ops.kernel_inputs import dense_heads, parameter, ssd_inputs
from ssmtune.ops.packing import n_kept_states

CHUNK_SIZE = 64


def chunk_states_shape(x_shape: tuple[int, ...], groups: int, dstate: int, n_sequences: int | None) -> tuple[int, ...]:
    """Return the shape of the buffer in which the forward scan keeps the states between chunks."""
    batch, seqlen, heads, headdim = x_shape
    return batch, n_kept_states(seqlen, n_sequences, CHUNK_SIZE), heads, headdim, dstate


def forward(inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, *options_and_results) -> None:
    """Run the scan."""
    native.operator("ssd_scan_fwd")(*ssd_inputs(*inputs), cu_seqlens, *options_and_results)


def backward(
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    gradients: list[Tensor | None],
) -> None:
    """Run the scan backward."""
    native.operator("ssd_scan_bwd")(
        None if dout is None else dense_heads(dout, inputs[0].dtype),
        parameter(dfinal_states),
        *ssd_inputs(*inputs),
        *(cu_seqlens, chunk_states, dt_softplus, dt_min, dt_max),
        *gradients,
    )

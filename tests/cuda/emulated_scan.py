"""A backend of the selective scan for tests: the CUDA kernels on the CPU, with the interface of ssmtune/ops/cpu.py."""

import ctypes
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ssmtune.ops.kernel_inputs import parameter, scan_inputs, sequence

CHUNK_SIZE = 32
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAYOUT = (
    *("states", "lanes", "block_channels", "section_blocks", "channel_blocks", "row_groups", "segments"),
    *("blocks", "workspace_floats"),
)


class SequenceTensor(Structure):
    _fields_ = [
        *(("data", c_void_p), ("dtype", c_int32), ("channels_last", c_bool)),
        *(("batch_stride", c_int64), ("stride", c_int64)),
    ]


class StateTensor(Structure):
    _fields_ = [("x", SequenceTensor), ("group_stride", c_int64)]


class ChannelParameter(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64)]


class Parameters(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "dim", "seqlen", "dstate", "groups", "rows")),
        ("bounds", c_void_p),
        *((name, SequenceTensor) for name in ("u", "delta", "z")),
        *((name, StateTensor) for name in ("B", "C")),
        *((name, c_void_p) for name in ("A", "D", "delta_bias")),
        *((name, ChannelParameter) for name in ("initial_state", "state_offset", "output_offset")),
        ("delta_softplus", c_bool),
        *((name, c_void_p) for name in ("chunk_states", "workspace")),
    ]


class Forward(Structure):
    _anonymous_ = ("p",)
    _fields_ = [("p", Parameters), ("out", SequenceTensor), ("last_state", c_void_p)]


class Backward(Structure):
    _anonymous_ = ("p",)
    _fields_ = [
        ("p", Parameters),
        *((name, SequenceTensor) for name in ("dout", "du", "ddelta", "dz")),
        *((name, c_void_p) for name in ("dlast_state", "dB", "dC", "dA", "dD", "ddelta_bias")),
        *((name, ChannelParameter) for name in ("dinitial_state", "dstate_offset", "doutput_offset")),
    ]


_library: ctypes.CDLL | None = None


def load(path: Path) -> ctypes.CDLL:
    """Use this library from now on."""
    global _library
    _library = ctypes.CDLL(path)
    assert _library.forward_size() == ctypes.sizeof(Forward) and _library.backward_size() == ctypes.sizeof(Backward)
    for name, kind in (("scan_forward", Forward), ("scan_backward", Backward)):
        getattr(_library, name).restype, getattr(_library, name).argtypes = c_char_p, [POINTER(kind)]
    return _library


def set_order(order: int) -> None:
    """Choose the order of threads and blocks: 0 forward, 1 in reverse, others shuffle them."""
    _library.set_order(order)


def scan_layout(params: Forward | Backward) -> dict[str, int]:
    """How a scan of these sizes is cut into blocks, and the memory it needs."""
    numbers = (c_int64 * len(LAYOUT))()
    describe = _library.forward_layout if isinstance(params, Forward) else _library.backward_layout
    describe(byref(params), numbers)
    return dict(zip(LAYOUT, numbers, strict=True))


def chunk_states_shape(
    batch: int, dim: int, seqlen: int, dstate: int, groups: int, n_sequences: int | None
) -> tuple[int, ...]:
    return batch, (seqlen - (1 if n_sequences is None else n_sequences)) // CHUNK_SIZE, dim, dstate


def selective_scan_forward(inputs, cu_seqlens, delta_softplus, out, last_state, chunk_states) -> None:
    inputs = scan_inputs(*inputs)
    bounds = None if cu_seqlens is None else cu_seqlens.long()
    params = Forward(out=_sequence(out), last_state=_pointer(last_state))
    _fill(params, inputs, bounds, delta_softplus, chunk_states)
    _check(_library.scan_forward(byref(params)))


def selective_scan_backward(dout, dlast_state, inputs, cu_seqlens, chunk_states, delta_softplus, gradients) -> None:
    dout, dlast_state, inputs = sequence(dout, inputs[0].dtype), parameter(dlast_state), scan_inputs(*inputs)
    bounds = None if cu_seqlens is None else cu_seqlens.long()
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")
    params = Backward(dout=_sequence(dout), dlast_state=_pointer(dlast_state))
    _fill(params, inputs, bounds, delta_softplus, chunk_states)
    for name, gradient in zip(names, gradients, strict=False):
        setattr(params, name, _sequence(gradient) if name in ("du", "ddelta", "dz") else _pointer(gradient))
    params.dinitial_state, params.dstate_offset = (_channels(x, 2) for x in gradients[8:10])
    params.doutput_offset = _channels(gradients[10], 1)
    _check(_library.scan_backward(byref(params)))


def _check(message: bytes) -> None:
    if message:
        raise RuntimeError(message.decode())


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sequence(x: Tensor | None) -> SequenceTensor:
    if x is None:
        return SequenceTensor()
    last = x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1) or x.stride(2) != 1
    return SequenceTensor(x.data_ptr(), DTYPES[x.dtype], last, x.stride(0), x.stride(2) if last else x.stride(1))


def _states(x: Tensor) -> StateTensor:
    if x.dim() == 3:
        return StateTensor(_sequence(x), 0)
    return StateTensor(_sequence(x[:, 0]), x.stride(1))


def _channels(x: Tensor | None, dims: int) -> ChannelParameter:
    if x is None:
        return ChannelParameter()
    return ChannelParameter(x.data_ptr(), x.stride(0) if x.dim() > dims else 0)


def _fill(params, inputs, bounds, delta_softplus, chunk_states) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset = inputs
    params.batch, params.dim, params.seqlen = u.shape
    params.dstate, params.groups = A.shape[1], B.shape[1] if B.dim() == 4 else 1
    params.rows = params.batch if bounds is None else len(bounds) - 1
    params.bounds, params.chunk_states = _pointer(bounds), _pointer(chunk_states)
    params.u, params.delta, params.z = map(_sequence, (u, delta, z))
    params.B, params.C = map(_states, (B, C))
    params.A, params.D, params.delta_bias = map(_pointer, (A, D, delta_bias))
    params.initial_state, params.state_offset = (_channels(x, 2) for x in (initial_state, state_offset))
    params.output_offset = _channels(output_offset, 1)
    params.delta_softplus = delta_softplus

"""The calls whose Triton kernels are compiled and counted: those of a large model, on tensors that hold nothing.

Each is named by its dtype and by what differs from the default: width 4 or 16 states, channels-last, every optional
tensor that a plain Mamba has, and the gradients that it owes when its weights are frozen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from ssmtune.ops import layout, ssd_scan_triton, triton

BATCH, DIM, SEQLEN = 8, 4096, 2048
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class KernelCase:
    """A call of the Triton backend.

    Attributes:
        fast: whether it stands for the others where there is no time for all.
    """

    op: str
    label: str
    call: Callable[[], None]
    fast: bool = False


def cases() -> Iterator[KernelCase]:
    """Every case, those of one operator next to each other."""
    for name, dstate in (*((name, 16) for name in DTYPES), *(("bfloat16", dstate) for dstate in (64, 128, 256))):
        call = partial(scan, DTYPES[name], dstate)
        yield KernelCase("selective_scan", _with_states(name, dstate), call, (name, dstate) == ("bfloat16", 16))
    for label, options in {
        "all gradients": {"parameters": True},
        "offsets": {"offsets": True},
        "initial state alone": {"trained": ("initial_state",)},
        "without z": {"z": False},
        "packed": {"packed": True},
        "groups": {"groups": 8},
        "channels-first": {"first": True},
        "segments of one sequence": {"segments": True},
        "segments of packed sequences": {"packed": True, "segments": True},
    }.items():
        call = partial(scan, torch.bfloat16, 16, **options)
        yield KernelCase("selective_scan", f"bfloat16, {label}", call, fast=label == "offsets")
    for name, dtype in DTYPES.items():
        yield KernelCase("causal_conv1d", name, partial(convolve, dtype), fast=name == "bfloat16")
    for label, options in {
        "all gradients": {"weights": True},
        "states": {"states": True},
        "packed": {"packed": True},
        "channels-first": {"first": True},
        "channels-first, all gradients": {"first": True, "weights": True},
        "width 2": {"width": 2},
        "width 3": {"width": 3},
    }.items():
        call = partial(convolve, torch.bfloat16, **options)
        yield KernelCase("causal_conv1d", f"bfloat16, {label}", call, fast=label == "all gradients")
    for name, dtype in DTYPES.items():
        yield KernelCase("causal_conv1d_update", name, partial(convolve_step, dtype), fast=name == "bfloat16")
    for name, dtype in DTYPES.items():
        for dstate in (16, 64, 128, 256):
            call = partial(update_state, dtype, dstate)
            fast = (name, dstate) in {("bfloat16", 16), ("float32", 256)}
            yield KernelCase("selective_state_update", _with_states(name, dstate), call, fast)
    for label, options in {"offsets of adapters": {"adapters": True}, "groups": {"groups": 8}}.items():
        call = partial(update_state, torch.bfloat16, 16, **options)
        yield KernelCase("selective_state_update", f"bfloat16, {label}", call)
    for label, options in {
        "bfloat16": {},
        "bfloat16, all gradients": {"offsets": True},
        "bfloat16, packed": {"offsets": True, "packed": True},
        "float32, all gradients": {"offsets": True},
    }.items():
        call = partial(scan_heads, DTYPES[label.partition(",")[0]], **options)
        yield KernelCase("ssd_scan", label, call, fast=not options)


def scan(
    dtype: torch.dtype, dstate: int, *, parameters: bool = False, offsets: bool = False,
    trained: tuple[str, ...] = (), z: bool = True, packed: bool = False, groups: int | None = None, first: bool = False,
    segments: bool = False,
) -> None:  # fmt: skip
    """The scan with D, z and a bias of delta, forward and backward.

    Args:
        parameters: whether A, D and delta_bias ask for gradients too.
        offsets: whether there are an initial state, a state offset and an output offset, with gradients.
        trained: the only inputs that ask for gradients, where there are any; they are given.
        packed: 32 sequences, or 3 where there are segments.
        segments: whether time is cut into segments, as for few sequences on a large GPU.
    """
    batch = 1 if packed or segments else BATCH
    states = trained or (("initial_state", "state_offset", "output_offset") if offsets else ())
    B = _empty(batch, SEQLEN, *([groups] if groups else []), dstate, dtype=dtype).movedim(1, -1)
    inputs = {
        "u": _sequence(dtype, first, batch),
        "delta": _sequence(dtype, first, batch),
        "A": _empty(DIM, dstate),
        "B": B,
        "C": B,
        "D": _empty(DIM),
        "z": _sequence(dtype, first, batch) if z else None,
        "delta_bias": _empty(DIM),
        "initial_state": _empty(DIM, dstate) if "initial_state" in states else None,
        "state_offset": _empty(DIM, dstate) if "state_offset" in states else None,
        "output_offset": _empty(DIM) if "output_offset" in states else None,
    }
    wanted = {*(trained or ("u", "delta", "B", "C", "z", *states)), *(("A", "D", "delta_bias") if parameters else ())}
    rows = (3 if segments else 32) if packed else batch
    cu_seqlens = torch.empty(rows + 1, dtype=torch.int32, device="meta") if packed else None
    last_state = _empty(rows, DIM, dstate)
    shape = triton.chunk_states_shape(batch, DIM, SEQLEN, dstate, groups or 1, rows if packed else None)
    out, chunk_states = layout.empty_like(inputs["u"]), _empty(*shape)
    gradients = [tensor if name in wanted else None for name, tensor in inputs.items()]
    with patch("ssmtune.triton_kernels.selective_scan.multiprocessors", return_value=132 if segments else 0):
        triton.selective_scan_forward(tuple(inputs.values()), cu_seqlens, True, out, last_state, chunk_states)
        triton.selective_scan_backward(
            layout.empty_like(out), None, tuple(inputs.values()), cu_seqlens, chunk_states, True, gradients
        )


def scan_heads(dtype: torch.dtype, *, offsets: bool = False, packed: bool = False) -> None:
    """Mamba-2's scan with D and a bias of dt, 64 channels of a head and 128 states of each, forward and backward.

    Args:
        offsets: whether there are initial states, a state offset and an output offset, and all gradients are asked for.
        packed: 32 sequences, each with states and offsets of its own.
    """
    headdim, dstate = 64, 128
    batch, heads = 1 if packed else BATCH, DIM // headdim
    rows = 32 if packed else batch
    own = [rows] if packed else []
    x = _empty(batch, SEQLEN, heads, headdim, dtype=dtype)
    B = _empty(batch, SEQLEN, 1, dstate, dtype=dtype)
    states = [_empty(*own, heads, headdim, dstate) if offsets else None for _ in range(2)]
    output_offset = _empty(*own, heads, headdim) if offsets else None
    dt, A = _empty(batch, SEQLEN, heads, dtype=dtype), _empty(heads)
    inputs = x, dt, A, B, B, _empty(heads, headdim), A, *states, output_offset
    cu_seqlens = torch.empty(rows + 1, dtype=torch.int32, device="meta") if packed else None
    shape = ssd_scan_triton.chunk_states_shape(x.shape, 1, dstate, rows if packed else None)
    final_states, chunk_states = _empty(rows, heads, headdim, dstate), _empty(*shape)
    options = True, 0.0, float("inf")
    ssd_scan_triton.forward(inputs, cu_seqlens, *options, x, final_states, chunk_states)
    gradients = [tensor if offsets or i in (0, 1, 3, 4) else None for i, tensor in enumerate(inputs)]
    ssd_scan_triton.backward(x, final_states, inputs, cu_seqlens, chunk_states, *options, gradients)


def convolve(
    dtype: torch.dtype, *, weights: bool = False, states: bool = False, packed: bool = False, first: bool = False,
    width: int = 4,
) -> None:  # fmt: skip
    """The convolution with bias and SiLU, forward and backward."""
    x = _sequence(dtype, first, batch=1 if packed else BATCH)
    weight, bias = _empty(DIM, width), _empty(DIM)
    n_sequences = 32 if packed else BATCH
    initial_states = _empty(n_sequences, DIM, width - 1) if states else None
    final_states = _empty(n_sequences, DIM, width - 1, dtype=dtype) if states else None
    cu_seqlens = torch.empty(n_sequences + 1, dtype=torch.int32, device="meta") if packed else None
    inputs = x, weight, bias, initial_states, cu_seqlens
    triton.causal_conv1d_forward(inputs, True, layout.empty_like(x), final_states)
    gradients = [layout.empty_like(x), *((weight, bias) if weights else (None, None)), initial_states]
    triton.causal_conv1d_backward(layout.empty_like(x), final_states, inputs, True, gradients)


def convolve_step(dtype: torch.dtype) -> None:
    """One step of the convolution with bias and SiLU, its state the last columns of a cache."""
    state = _empty(BATCH, DIM, 4, dtype=dtype)[:, :, 1:]
    triton.causal_conv1d_update(_half_of_a_projection(BATCH, dtype=dtype), state, _empty(DIM, 4), _empty(DIM), True)


def update_state(dtype: torch.dtype, dstate: int, *, adapters: bool = False, groups: int | None = None) -> None:
    """One decoding step with a state offset and an output offset, shared or of each row's own adapter."""
    x = _empty(BATCH, DIM, dtype=dtype)
    B = _empty(BATCH, *([groups] if groups else []), dstate, dtype=dtype)
    stack = [4] if adapters else []
    triton.selective_state_update(
        *(_empty(BATCH, DIM, dstate), x, x, _empty(DIM, dstate), B, B, _empty(DIM), x, _empty(DIM), True),
        *(_empty(*stack, DIM, dstate), _empty(*stack, DIM)),
        torch.empty(BATCH, dtype=torch.int64, device="meta") if adapters else None,
    )


def _with_states(name: str, dstate: int) -> str:
    return name if dstate == 16 else f"{name}, {dstate} states"


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _half_of_a_projection(*rows: int, dtype: torch.dtype) -> Tensor:
    return _empty(*rows, 2 * DIM, dtype=dtype)[..., :DIM]


def _sequence(dtype: torch.dtype, first: bool = False, batch: int = BATCH) -> Tensor:
    if first:
        return _empty(batch, DIM, SEQLEN, dtype=dtype)
    return _half_of_a_projection(batch, SEQLEN, dtype=dtype).transpose(1, 2)

"""Wrong calls are refused with what failed, why, and what to do; never by a kernel."""

import re

import pytest
import torch

from ssmtune.ops import causal_conv1d, selective_scan, selective_state_update

BATCH, DIM, SEQLEN, DSTATE, WIDTH = 2, 6, 5, 4, 3


def scan_inputs():
    return {
        "u": torch.randn(BATCH, DIM, SEQLEN),
        "delta": torch.rand(BATCH, DIM, SEQLEN),
        "A": -torch.rand(DIM, DSTATE),
        "B": torch.randn(BATCH, DSTATE, SEQLEN),
        "C": torch.randn(BATCH, DSTATE, SEQLEN),
    }


def packed_inputs():
    sequences = {name: x[:1] if x.dim() == 3 else x for name, x in scan_inputs().items()}
    return sequences | {"cu_seqlens": torch.tensor([0, 2, SEQLEN])}


def update_inputs():
    return {
        "state": torch.randn(BATCH, DIM, DSTATE),
        "x": torch.randn(BATCH, DIM),
        "dt": torch.rand(BATCH, DIM),
        "A": -torch.rand(DIM, DSTATE),
        "B": torch.randn(BATCH, DSTATE),
        "C": torch.randn(BATCH, DSTATE),
    }


def conv_inputs():
    return {"x": torch.randn(BATCH, DIM, SEQLEN), "weight": torch.randn(DIM, WIDTH)}


OPERATORS = {
    "packed": (selective_scan, packed_inputs),
    "selective_scan": (selective_scan, scan_inputs),
    "selective_state_update": (selective_state_update, update_inputs),
    "causal_conv1d": (causal_conv1d, conv_inputs),
}


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


# operator, what is changed in a right call, the error, and pieces of its message in order
WRONG = [
    (
        "selective_scan",
        {"u": zeros(DIM, SEQLEN)},
        ValueError,
        ["u has shape (6, 5)", "(batch, dim, seqlen)", "unsqueeze"],
    ),
    (
        "selective_scan",
        {"u": zeros(0, DIM, SEQLEN)},
        ValueError,
        ["u has shape (0, 6, 5)", "batch is 0", "Skip the call"],
    ),
    ("selective_scan", {"u": zeros(2, DIM, 0)}, ValueError, ["u has shape (2, 6, 0)", "seqlen is 0", "Skip the call"]),
    ("selective_scan", {"u": [1.0]}, TypeError, ["u is of type list", "expected a tensor", "torch.as_tensor(u)"]),
    ("selective_scan", {"u": None}, TypeError, ["u is of type NoneType", "expected a tensor."]),
    ("selective_scan", {"z": 1.0}, TypeError, ["z is of type float", "a tensor or None"]),
    (
        "selective_scan",
        {"u": zeros(2, DIM, SEQLEN, dtype=torch.int64)},
        TypeError,
        ["u has dtype torch.int64", "u.float()"],
    ),
    (
        "selective_scan",
        {"A": zeros(DIM, DSTATE, dtype=torch.complex64)},
        TypeError,
        ["A has dtype torch.complex64", "Complex state"],
    ),
    (
        "selective_scan",
        {"delta": zeros(2, DIM, SEQLEN, device="meta")},
        ValueError,
        ["delta is on meta", "u is on cpu", "delta.to(u.device)"],
    ),
    (
        "selective_scan",
        {"delta": zeros(2, SEQLEN, DIM)},
        ValueError,
        ["delta has shape (2, 5, 6)", "(batch, dim, seqlen) = (2, 6, 5)", "transpose delta"],
    ),
    ("selective_scan", {"delta": zeros(2, DIM, 4)}, ValueError, ["delta has shape (2, 6, 4)", "seqlen are those of u"]),
    (
        "selective_scan",
        {"A": zeros(7, DSTATE)},
        ValueError,
        ["A has shape (7, 4)", "(dim, dstate) = (6, 4)", "dim is that of u"],
    ),
    ("selective_scan", {"A": zeros(DIM, 0)}, ValueError, ["A has shape (6, 0)", "dstate is 0"]),
    ("selective_scan", {"A": zeros(DIM)}, ValueError, ["A has shape (6,)", "2 dimensions, (dim, dstate)"]),
    (
        "selective_scan",
        {"B": zeros(2, SEQLEN, DSTATE)},
        ValueError,
        ["B has shape (2, 5, 4)", "(batch, dstate, seqlen) = (2, 4, 5)", "transpose B"],
    ),
    (
        "selective_scan",
        {"C": zeros(2, 1, DSTATE, SEQLEN)},
        ValueError,
        ["C has shape (2, 1, 4, 5)", "B (2, 4, 5)", "both with groups", "unsqueeze(1)"],
    ),
    (
        "selective_scan",
        {"B": zeros(2, 4, DSTATE, SEQLEN), "C": zeros(2, 4, DSTATE, SEQLEN)},
        ValueError,
        ["B has shape (2, 4, 4, 5)", "groups is 4, expected a divisor of dim = 6"],
    ),
    (
        "selective_scan",
        {"B": zeros(2, 3, DSTATE, SEQLEN), "C": zeros(2, 2, DSTATE, SEQLEN)},
        ValueError,
        ["C has shape (2, 2, 4, 5)", "(batch, groups, dstate, seqlen) = (2, 3, 4, 5)", "the groups of B"],
    ),
    (
        "selective_scan",
        {"B": zeros(DIM, DSTATE)},
        ValueError,
        ["B has shape (6, 4)", "(batch, dstate, seqlen) = (2, 4, 5)"],
    ),
    ("selective_scan", {"D": zeros(7)}, ValueError, ["D has shape (7,)", "(dim,) = (6,)"]),
    ("selective_scan", {"delta_bias": zeros(6, 1)}, ValueError, ["delta_bias has shape (6, 1)", "(dim,) = (6,)"]),
    (
        "selective_scan",
        {"state_offset": zeros(DIM, 8)},
        ValueError,
        ["state_offset has shape (6, 8)", "(dim, dstate) = (6, 4) or (batch, dim, dstate) = (2, 6, 4)", "trained for"],
    ),
    (
        "selective_scan",
        {"initial_state": zeros(3, DIM, DSTATE)},
        ValueError,
        ["initial_state has shape (3, 6, 4)", "(2, 6, 4)"],
    ),
    (
        "selective_scan",
        {"output_offset": zeros(3, DIM)},
        ValueError,
        ["output_offset has shape (3, 6)", "(dim,) = (6,) or (batch, dim) = (2, 6)"],
    ),
    (
        "selective_scan",
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        ["cu_seqlens was given", "u has batch 2, expected 1", "Join the rows"],
    ),
    ("selective_scan", {"cu_seqlens": [0, 5]}, TypeError, ["cu_seqlens is of type list", "torch.tensor(cu_seqlens"]),
    (
        "selective_scan",
        {"cu_seqlens": torch.tensor([0.0, 5.0])},
        TypeError,
        ["cu_seqlens has dtype torch.float32", "int32 or int64", "cu_seqlens.int()"],
    ),
    (
        "selective_scan",
        {"cu_seqlens": torch.tensor([0])},
        ValueError,
        ["cu_seqlens has shape (1,)", "(n_sequences + 1,)", "[0, seqlen]"],
    ),
    (
        "selective_scan",
        {"cu_seqlens": torch.tensor([0, 5], device="meta")},
        ValueError,
        ["cu_seqlens is on meta", "u is on cpu", "cu_seqlens.to(u.device)"],
    ),
    ("packed", {"cu_seqlens": torch.tensor([1, 5])}, ValueError, ["cu_seqlens starts with 1", "Put a 0 before"]),
    (
        "packed",
        {"cu_seqlens": torch.tensor([0, 3, 3, 5])},
        ValueError,
        ["holds 3 and then 3 (values 1 and 2)", "sequence 1 has no steps", "Leave out"],
    ),
    ("packed", {"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, ["holds 3 and then 2", "must increase"]),
    (
        "packed",
        {"cu_seqlens": torch.tensor([0, 3, 7])},
        ValueError,
        ["cu_seqlens ends with 7", "seqlen = 5", "padding"],
    ),
    (
        "packed",
        {"initial_state": zeros(3, DIM, DSTATE)},
        ValueError,
        ["initial_state has shape (3, 6, 4)", "(n_sequences, dim, dstate) = (2, 6, 4)", "one value more"],
    ),
    ("packed", {"output_offset": zeros(1, DIM)}, ValueError, ["output_offset", "(n_sequences, dim) = (2, 6)"]),
    (
        "selective_scan",
        {"backend": "refrence"},
        ValueError,
        ["there is no backend 'refrence'", "did you mean 'reference'?", "cuda, triton, cpu, reference"],
    ),
    (
        "selective_scan",
        {"backend": "cuda"},
        RuntimeError,
        ["backend 'cuda' was requested but cannot run", "available_backends"],
    ),
    (
        "selective_state_update",
        {"state": zeros(DIM, DSTATE)},
        ValueError,
        ["state has shape (6, 4)", "(batch, dim, dstate)"],
    ),
    ("selective_state_update", {"state": zeros(0, DIM, DSTATE)}, ValueError, ["batch is 0"]),
    (
        "selective_state_update",
        {"x": zeros(BATCH, DIM, 1)},
        ValueError,
        ["x has shape (2, 6, 1)", "(batch, dim) = (2, 6)"],
    ),
    (
        "selective_state_update",
        {"B": zeros(BATCH, 1, DSTATE)},
        ValueError,
        ["C has shape (2, 4) and B (2, 1, 4)", "both with groups or both without"],
    ),
    (
        "selective_state_update",
        {"B": zeros(BATCH, 4, DSTATE), "C": zeros(BATCH, 4, DSTATE)},
        ValueError,
        ["B has shape (2, 4, 4)", "groups is 4", "a divisor of dim = 6"],
    ),
    (
        "selective_state_update",
        {"adapter_index": [0, 1], "output_offset": zeros(3, DIM)},
        TypeError,
        ["adapter_index is of type list", "torch.tensor(adapter_index"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH), "output_offset": zeros(3, DIM)},
        TypeError,
        ["adapter_index has dtype torch.float32, expected int32 or int64", "places in a stack"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(3, dtype=torch.int64), "output_offset": zeros(3, DIM)},
        ValueError,
        ["adapter_index has shape (3,)", "(batch,) = (2,)", "Each row of state has one"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH, dtype=torch.int64)},
        ValueError,
        ["adapter_index was given without state_offset and output_offset"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH, dtype=torch.int64), "state_offset": zeros(DIM, DSTATE)},
        ValueError,
        ["state_offset has shape (6, 4)", "(n_adapters, dim, dstate) = (1, 6, 4)", "offsets are stacks"],
    ),
    (
        "selective_state_update",
        {
            "adapter_index": zeros(BATCH, dtype=torch.int64),
            "state_offset": zeros(3, DIM, DSTATE),
            "output_offset": zeros(2, DIM),
        },
        ValueError,
        ["output_offset has shape (2, 6)", "(n_adapters, dim) = (3, 6)"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH, dtype=torch.int64), "output_offset": zeros(0, DIM)},
        ValueError,
        ["output_offset has shape (0, 6)", "(n_adapters, dim) = (1, 6)"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH, dtype=torch.int64), "output_offset": zeros(3, DIM, dtype=torch.bfloat16)},
        TypeError,
        ["output_offset has dtype torch.bfloat16, expected float32", "would copy every adapter"],
    ),
    (
        "selective_state_update",
        {"adapter_index": zeros(BATCH, dtype=torch.int64), "state_offset": zeros(3, DSTATE, DIM).mT},
        ValueError,
        ["the entries of state_offset have strides (1, 6)", "read where it lies", "state_offset.contiguous()"],
    ),
    (
        "selective_state_update",
        {"adapter_index": torch.tensor([0, 3]), "state_offset": zeros(3, DIM, DSTATE)},
        ValueError,
        ["adapter_index has 3 for row 1, expected -1 to 2", "-1 stands for none"],
    ),
    ("selective_state_update", {"z": zeros(DIM, BATCH)}, ValueError, ["z has shape (6, 2)", "transpose z"]),
    ("selective_state_update", {"output_offset": zeros(5)}, ValueError, ["output_offset has shape (5,)"]),
    ("selective_state_update", {"dt": zeros(BATCH, DIM, dtype=torch.bool)}, TypeError, ["dt has dtype torch.bool"]),
    ("selective_state_update", {"backend": "cpy"}, ValueError, ["did you mean 'cpu'?"]),
    ("causal_conv1d", {"x": zeros(DIM, SEQLEN)}, ValueError, ["x has shape (6, 5)", "3 dimensions"]),
    ("causal_conv1d", {"x": zeros(2, DIM, 0)}, ValueError, ["seqlen is 0"]),
    (
        "causal_conv1d",
        {"weight": zeros(DIM, 1, WIDTH)},
        ValueError,
        ["weight has shape (6, 1, 3)", "(dim, width)", "squeeze"],
    ),
    ("causal_conv1d", {"weight": zeros(7, WIDTH)}, ValueError, ["weight has shape (7, 3)", "(dim, width) = (6, 3)"]),
    ("causal_conv1d", {"bias": zeros(7)}, ValueError, ["bias has shape (7,)", "(dim,) = (6,)"]),
    (
        "causal_conv1d",
        {"initial_states": zeros(BATCH, DIM, WIDTH)},
        ValueError,
        ["initial_states has shape (2, 6, 3)", "(batch, dim, width - 1) = (2, 6, 2)"],
    ),
    ("causal_conv1d", {"activation": "sillu"}, ValueError, ["there is no activation 'sillu'", "did you mean 'silu'?"]),
    ("causal_conv1d", {"activation": "gelu"}, ValueError, ["there is no activation 'gelu'.", "activation=None"]),
    ("causal_conv1d", {"bias": "yes"}, TypeError, ["bias is of type str"]),
]


@pytest.mark.parametrize(
    "op, change, error, pieces", WRONG, ids=[f"{row[0]}-{next(iter(row[1]))}-{row[3][0][:30]}" for row in WRONG]
)
def test_wrong_arguments(op, change, error, pieces):
    function, inputs = OPERATORS[op]
    with pytest.raises(error) as raised:
        function(**inputs() | change)
    message = str(raised.value)
    assert re.search(".*".join(map(re.escape, pieces)), message, re.DOTALL), message
    lines = message.splitlines()
    assert 2 <= len(lines) <= 4 and all(len(line) <= 160 for line in lines), message
    name = function.__name__
    assert lines[0].startswith(f"{name}: ") and all(line.startswith("  ") for line in lines[1:]), message


@pytest.mark.parametrize("op", OPERATORS)
def test_right_arguments(op):
    function, inputs = OPERATORS[op]
    function(**inputs())

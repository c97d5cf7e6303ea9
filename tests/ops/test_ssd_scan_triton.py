"""Mamba-2's scan on Triton, in its interpreter: few steps, in chunks so small that they cross their bounds."""

import math

import pytest
import torch
from ssd_inputs import compare, compare_packed, draw, run

pytestmark = pytest.mark.usefixtures("triton_chunks_of_8", "poison_empty")


@pytest.fixture
def large_gpu(triton_chunks_of_8, monkeypatch):
    """As on a GPU so large that work is cut into as many parts as there can be."""
    monkeypatch.setattr(triton_chunks_of_8, "multiprocessors", lambda device: 1000)


@pytest.fixture
def bfloat16_operands(triton_chunks_of_8, monkeypatch):
    """Products of bfloat16, as on a GPU: NumPy has no such type."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_bfloat16(self, *args):
        assert {x.dtype for x in args[:2]} == {tl.bfloat16}
        wide = (interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None) for x in args[:2])
        return dot(self, *(interpreter.TensorHandle(data, tl.float32) for data in wide), *args[2:])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bfloat16)
    monkeypatch.setattr(triton_chunks_of_8, "operands", lambda dtype: {"OPERAND": tl.bfloat16, "PRECISION": "ieee"})


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 19, 2, 5, 1, 7), (2, 8, 1, 9, 1, 9)], ids=str)
def test_equals_the_recurrence(sizes):
    compare(draw(*sizes), "triton")


def test_rows_have_states_and_offsets_of_their_own():
    compare(draw(2, 9, 1, 3, 1, 4, per_row=True), "triton")


def test_parts_of_sums_are_added_up(large_gpu):
    compare(draw(1, 9, 4, 3, 2, 5), "triton")


@pytest.mark.parametrize("per_row", [True, False], ids=["per-sequence", "shared"])
def test_packed_sequences(per_row):
    inputs = draw(1, 19, 1, 3, 1, 4, per_row=per_row, rows=3)
    compare_packed(inputs, "triton", torch.tensor([0, 1, 10, 19]))


@pytest.mark.parametrize("softplus, limit", [(True, (0.1, 0.4)), (False, (0.2, math.inf))], ids=str)
def test_steps_are_cut_off_at_their_limits(softplus, limit):
    compare(draw(1, 5, 2, 2, 1, 2, dt_softplus=softplus), "triton", dt_limit=limit, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    compare(draw(1, 9, 1, 5, 1, 7, dtype=dtype), "triton", dtype)


def test_states_are_read_in_bfloat16(bfloat16_operands):
    compare(draw(1, 9, 2, 5, 1, 7, dtype=torch.bfloat16), "triton", torch.bfloat16)


def test_a_step_that_forgets_everything_blurs_none_after_it():
    inputs = draw(1, 16, 1, 4, 1, 4, optional=("D",), dt_softplus=False)
    inputs["dt"][:, 2] = 5000.0
    compare(inputs, "triton", dt_softplus=False)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "dt_bias", "initial_states"])
def test_a_gradient_asked_for_alone_is_that_among_all(name):
    inputs = draw(1, 5, 1, 2, 1, 2)

    def gradient(names):
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in inputs.items()}
        out, states = run(leaves, backend="triton")
        return torch.autograd.grad(out.square().sum() + states.sum(), leaves[name])[0]

    assert torch.equal(gradient([name]), gradient(list(inputs)))


def test_takes_views_of_one_projection():
    inputs = draw(1, 9, 2, 4, 1, 4)
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=2)
    x, B, C = joined.split([8, 4, 4], dim=2)
    views = {"x": x.unflatten(2, (2, 4)), "B": B.unflatten(2, (1, 4)), "C": C.unflatten(2, (1, 4))}
    for a, b in zip(run(inputs, backend="triton"), run(inputs | views, backend="triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "programs, most, n_multiprocessors, expected",
    [(264, 80, 132, 1), (263, 80, 132, 2), (1, 80, 132, 80), (33, 80, 132, 8), (1, 80, 0, 1)],
)
def test_splits(triton_chunks_of_8, monkeypatch, programs, most, n_multiprocessors, expected):
    monkeypatch.setattr(triton_chunks_of_8, "multiprocessors", lambda device: n_multiprocessors)
    assert triton_chunks_of_8.splits(programs, most, torch.device("cpu")) == expected

"""Mamba-2's scan against the plain recurrence in float64: outputs, final states and every gradient."""

import math

import emulated_cuda
import pytest
import torch
from numerics import assert_close
from ssd_inputs import OPTIONAL, compare, draw, run

from ssmtune.ops import backends, ssd_scan

SIZES = {
    # batch, seqlen, nheads, headdim, ngroups, dstate
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (2, 71, 3, 5, 1, 7),
    "groups": (2, 130, 6, 20, 2, 24),
    "group-per-head": (1, 65, 2, 33, 2, 16),
    "mamba2": (1, 129, 2, 64, 1, 128),
}


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request):
    if request.param != "reference":
        request.getfixturevalue({"cpu": "native_kernels", "triton": "triton_interpreter"}[request.param])
    return request.param


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_recurrence(backend, sizes):
    compare(draw(*SIZES[sizes]), backend)


def test_cuda_runs_it_as_a_selective_scan(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda-emulated", emulated_cuda.backend())
    compare(draw(2, 9, 4, 3, 2, 5), "cuda-emulated", dt_limit=(0.1, 0.6))


@pytest.mark.parametrize("left_out", [*OPTIONAL, "all"])
def test_every_optional_argument_may_be_left_out(left_out):
    inputs = draw(*SIZES["odd"])
    compare({name: x for name, x in inputs.items() if name != left_out and (left_out != "all" or name not in OPTIONAL)},
            "auto")  # fmt: skip


@pytest.mark.parametrize("limit", [(0.0, 0.3), (0.2, math.inf), (0.1, 0.4)], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_steps_are_cut_off_at_their_limits(backend, limit, softplus):
    compare(draw(2, 9, 2, 4, 1, 4, dt_softplus=softplus), backend, dt_limit=limit, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", ["odd", "groups"])
def test_half_types(backend, sizes, dtype):
    compare(draw(*SIZES[sizes], dtype=dtype), backend, dtype)


@pytest.mark.parametrize("per_row", [True, False], ids=["per-row", "shared"])
def test_states_and_offsets_of_rows(backend, per_row):
    compare(draw(2, 9, 3, 5, 1, 7, per_row=per_row), backend)


def test_a_step_that_forgets_everything_blurs_none_after_it(backend):
    # sums of decays over a chunk, in float32, would lose the small steps beside the large one
    inputs = draw(1, 64, 2, 4, 1, 4, optional=("D",), dt_softplus=False)
    inputs["dt"][:, 3] = 5000.0
    compare(inputs, backend, dt_softplus=False)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "state_offset"])
def test_a_gradient_asked_for_alone_is_that_among_all(backend, name):
    inputs = draw(2, 9, 4, 5, 2, 7)

    def gradient(names):
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in inputs.items()}
        out, states = run(leaves, backend=backend)
        return torch.autograd.grad(out.square().sum() + states.sum(), leaves[name])[0]

    # offsets alone are a matrix product, with sums in another order
    assert_close(name, gradient(list(inputs)), gradient([name]), 2e-6)


def test_gradcheck():
    inputs = draw(2, 5, 2, 3, 1, 2, dtype=torch.float64, per_row=True)
    tensors = {name: x.requires_grad_() for name, x in inputs.items()}

    def function(*values):
        return run(dict(zip(tensors, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_takes_views_of_one_projection(backend):
    # x, B and C as a convolution gives them, channels next to each other
    inputs = draw(2, 9, 4, 8, 2, 8)
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=2)
    x, B, C = joined.split([32, 16, 16], dim=2)
    views = {"x": x.unflatten(2, (4, 8)), "B": B.unflatten(2, (2, 8)), "C": C.unflatten(2, (2, 8))}
    views["dt"] = torch.cat([inputs["dt"], inputs["dt"]], dim=2)[:, :, :4]
    for name, a, b in zip(("out", "states"), run(inputs, backend=backend), run(inputs | views, backend=backend),
                          strict=True):  # fmt: skip
        assert torch.equal(a, b), name


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = {name: x.requires_grad_() for name, x in draw(2, 200, 6, 16, 2, 16).items()}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, states = run(inputs)
            gradients = torch.autograd.grad(out.square().sum() + states.sum(), list(inputs.values()))
            results.append((out, states, *gradients))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": torch.ones(3)}, r"A has shape \(3,\), expected \(nheads,\) = \(2,\)"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit is"),
        ({"B": torch.ones(1, 4, 3, 4), "C": torch.ones(1, 4, 3, 4)}, "3 groups for 2 heads"),
        ({"state_offset": torch.ones(2, 4, 3)}, "state_offset has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends with 5"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    inputs = draw(1, 4, 2, 3, 1, 4) | change
    with pytest.raises(ValueError, match=message):
        ssd_scan(**inputs)

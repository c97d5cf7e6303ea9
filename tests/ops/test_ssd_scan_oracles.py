"""Identities every implementation of Mamba-2's scan must satisfy, with their gradients; how torch sees the operator."""

import pytest
import torch
from numerics import assert_close
from ssd_inputs import SEQUENCES, draw, run

RATIO = 2e-6


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request):
    if request.param != "reference":
        request.getfixturevalue({"cpu": "native_kernels", "triton": "triton_chunks_of_8"}[request.param])
    return request.param


@pytest.fixture
def sizes(backend):
    """batch, seqlen, nheads, headdim, ngroups, dstate, over three chunks of the kernels."""
    return (1, 19, 2, 5, 1, 7) if backend == "triton" else (2, 140, 4, 6, 2, 8)


@pytest.fixture(params=[False, True], ids=["shared", "per-row"])
def inputs(request, sizes):
    return {name: x.requires_grad_() for name, x in draw(*sizes, per_row=request.param).items()}


def steps(inputs, start, stop):
    return {name: x[:, start:stop] if name in SEQUENCES else x for name, x in inputs.items()}


def gradients(results, inputs):
    results = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((result * torch.randn(result.shape, generator=generator)).sum() for result in results)
    return torch.autograd.grad(loss, list(inputs.values()))


@pytest.mark.parametrize("cuts", [(1,), (64,), (5, 6, 139)], ids=str)
def test_cutting_a_sequence_changes_nothing(inputs, backend, sizes, cuts):
    cuts = sorted({min(cut, sizes[1] - 1) for cut in cuts})
    whole = run(inputs, backend=backend)
    states, pieces = inputs["initial_states"], []
    for start, stop in zip((0, *cuts), (*cuts, sizes[1]), strict=True):
        out, states = run(steps(inputs, start, stop) | {"initial_states": states}, backend=backend)
        pieces.append(out)
    cut = torch.cat(pieces, dim=1), states
    for name, a, b in zip(("out", "states"), whole, cut, strict=True):
        assert_close(name, a, b, RATIO)
    for name, a, b in zip(inputs, gradients(whole, inputs), gradients(cut, inputs), strict=True):
        assert_close(f"d{name}", a, b, 4 * RATIO)


@pytest.mark.parametrize("inputs", [False], indirect=True)
def test_state_offset_is_a_state_that_never_moves(inputs, backend, sizes):
    # A = 0 and B = 0 in a second set of heads, which start at the offset and are read by the same C
    batch, _, heads, headdim, groups, dstate = sizes
    expected = run(inputs, backend=backend)
    kept = {"dt": inputs["dt"], "C": inputs["C"]}
    kept |= {"A": torch.zeros(heads), "B": torch.zeros_like(inputs["B"]), "x": torch.zeros_like(inputs["x"])}
    still, last = run(kept | {"initial_states": inputs["state_offset"]}, backend=backend)
    without = {name: x for name, x in inputs.items() if name not in ("state_offset", "z")}
    out, states = run(without, backend=backend)
    out = (out + still) * torch.nn.functional.silu(inputs["z"])
    assert torch.equal(last, inputs["state_offset"].expand(batch, -1, -1, -1)), "the offset moved"
    assert torch.equal(states, expected[1]), "the offset was carried"
    assert_close("out", expected[0], out, RATIO)
    for name, a, b in zip(inputs, gradients(expected, inputs), gradients((out, states), inputs), strict=True):
        assert_close(f"d{name}", a, b, 4 * RATIO)


@pytest.mark.parametrize("per_row", [True, False], ids=["per-sequence", "shared"])
def test_packed_sequences_are_those_run_one_by_one(backend, sizes, per_row):
    _, seqlen, *rest = sizes
    bounds = [0, 1, seqlen // 2, seqlen]
    inputs = {name: x.requires_grad_() for name, x in draw(1, seqlen, *rest, per_row=per_row, rows=3).items()}
    packed = run(inputs, backend=backend, cu_seqlens=torch.tensor(bounds))
    results = []
    for i in range(3):
        own = steps(inputs, bounds[i], bounds[i + 1])
        if per_row:
            own |= {name: inputs[name][i : i + 1] for name in ("initial_states", "state_offset", "output_offset")}
        results.append(run(own, backend=backend))
    outs, states = zip(*results, strict=True)
    alone = torch.cat(outs, dim=1), torch.cat(states)
    for name, a, b in zip(("out", "states"), packed, alone, strict=True):
        assert_close(name, a, b, RATIO)
    for name, a, b in zip(inputs, gradients(packed, inputs), gradients(alone, inputs), strict=True):
        assert_close(f"d{name}", a, b, 4 * RATIO)


def test_one_token_at_a_time_is_the_scan(backend, sizes):
    inputs = draw(*sizes)
    expected, last = run(inputs, backend=backend)
    states, out = inputs["initial_states"], []
    for t in range(sizes[1]):
        y, states = run(steps(inputs, t, t + 1) | {"initial_states": states}, backend=backend)
        out.append(y)
    assert_close("out", expected, torch.cat(out, dim=1), RATIO)
    assert_close("states", last, states, RATIO)


TRAINED = {"all": None, "offsets": ("state_offset", "output_offset", "D"), "none": ()}


@pytest.mark.parametrize("trained", TRAINED)
def test_opcheck(backend, trained):
    inputs = draw(2, 3, 4, 6, 2, 8, optional=("D", "dt_bias", "initial_states", "state_offset", "output_offset"),
                  per_row=True)  # fmt: skip
    for name in inputs if TRAINED[trained] is None else TRAINED[trained]:
        inputs[name].requires_grad_()
    args = (*inputs.values(), None, True, 0.0, float("inf"), trained == "all", backend)
    results = torch.library.opcheck(torch.ops.ssmtune.ssd_scan_fwd, args)
    assert set(results.values()) == {"SUCCESS"}, results


def test_opcheck_backward(backend):
    seqlen = 75
    inputs = draw(1, seqlen, 4, 6, 2, 8, optional=("D", "dt_bias"), per_row=True)
    tensors = (
        *inputs.values(),
        None,
        None,
        None,
        torch.tensor([0, 5, seqlen]),
    )
    options = (True, 0.1, 0.6)
    out, states, kept = torch.ops.ssmtune.ssd_scan_fwd(*tensors, *options, True, backend)
    wanted = [True] * 7 + [False] * 3
    args = (torch.randn_like(out), torch.randn_like(states), *tensors, kept, *options, wanted, backend)
    results = torch.library.opcheck(torch.ops.ssmtune.ssd_scan_bwd, args)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("trained", ["all", "offsets"])
def test_compiles_to_one_graph(backend, trained):
    inputs = draw(2, 9, 4, 6, 2, 8)
    names = TRAINED[trained] or list(inputs)
    for name in names:
        inputs[name].requires_grad_()

    def function(inputs):
        out, states = run(inputs, backend=backend)
        return 2 * out, states

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = function(inputs), compiled(inputs)
    leaves = {name: inputs[name] for name in names}
    a, b = ((*results, *gradients(results, leaves)) for results in (expected, actual))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)

"""The operators as PyTorch sees them: schemas, tracing, compilation and second derivatives."""

import pytest
import torch

from ssmtune.ops import causal_conv1d, selective_scan, selective_state_update
from ssmtune.ops.reference import selective_scan_reference
from ssmtune.ops.selective_scan_op import INPUTS

OFFSETS = ("state_offset", "output_offset")
# the same for few steps
PACKED = (([0, 70, 71, 90], [0, 5, 60, 90]), ([0, 5, 6, 9], [0, 2, 8, 9]))


def opcheck(op, args):
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.fixture
def conv_inputs():
    return {
        "x": torch.randn(2, 9, 6).transpose(1, 2),
        "weight": torch.randn(6, 4),
        "bias": torch.randn(6),
        "initial_states": torch.randn(2, 6, 3),
    }


@pytest.fixture
def update_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"state": (2, 6, 4), "x": (2, 6), "dt": (2, 6), "A": (6, 4), "B": (2, 4), "C": (2, 4), "D": (6,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "trained, layout",
    [((), "first"), (INPUTS, "last"), (OFFSETS, "last")],
    ids=["none-first", "all-last", "offsets-last"],
)
def test_opcheck_selective_scan_fwd(scan_inputs, backend, trained, layout):
    inputs = scan_inputs(2, 5, 9, 4, layouts=dict.fromkeys(("u", "z"), layout))
    for name in trained:
        inputs[name].requires_grad_()
    opcheck(torch.ops.ssmtune.selective_scan_fwd, (*inputs.values(), None, True, trained == INPUTS, backend))


def test_opcheck_selective_scan_fwd_half(scan_inputs, backend):
    inputs = scan_inputs(2, 5, 9, 4, optional=("z",), dtype=torch.bfloat16, layouts={"B": "odd"})
    args = [inputs.get(name) for name in INPUTS]
    opcheck(torch.ops.ssmtune.selective_scan_fwd, (*args, None, False, False, backend))


def test_opcheck_selective_scan_bwd(scan_inputs, backend):
    inputs = list(scan_inputs(2, 5, 9, 4).values())
    out, last_state, chunk_states = torch.ops.ssmtune.selective_scan_fwd(*inputs, None, True, True, backend)
    dout, dlast_state = torch.randn_like(out), torch.randn_like(last_state)
    for gradients, wanted in (((dout, dlast_state), [True] * 11), ((None, dlast_state), [True, False] * 5 + [True])):
        args = (*gradients, *inputs, None, chunk_states, True, wanted, backend)
        opcheck(torch.ops.ssmtune.selective_scan_bwd, args)


@pytest.mark.parametrize("groups", [None, 2], ids=["no-groups", "2-groups"])
@pytest.mark.parametrize("per_row", [(), ("initial_state", *OFFSETS)], ids=["shared", "per-sequence"])
def test_opcheck_selective_scan_packed(scan_inputs, backend, per_row, groups):
    if backend == "triton" and (groups is None) == bool(per_row):
        pytest.skip("opcheck calls often: two of the four are enough for an interpreter")
    # of the two states that may be kept between chunks, one is used; on CUDA all, for nothing is written to others
    others = {"triton": [0, 3, 6, 12], "cuda-emulated": [0, 33, 75, 140]}
    bounds = others.get(backend, [0, 20, 40, 75])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    inputs = scan_inputs(1, 6, bounds[-1], 4, per_row=per_row, rows=3, groups=groups)
    args = (cu_seqlens, True, True, backend)
    out, last_state, chunk_states = torch.ops.ssmtune.selective_scan_fwd(*inputs.values(), *args)
    assert last_state.shape == (3, 6, 4)
    gradients = (torch.randn_like(out), torch.randn_like(last_state))
    args_bwd = (*gradients, *inputs.values(), cu_seqlens, chunk_states, True, [True] * 11, backend)
    opcheck(torch.ops.ssmtune.selective_scan_bwd, args_bwd)
    opcheck(torch.ops.ssmtune.selective_scan_fwd, (*(x.requires_grad_() for x in inputs.values()), *args))


@pytest.mark.parametrize("adapter_index", [None, torch.tensor([1, -1])], ids=["shared", "adapters"])
@pytest.mark.parametrize("one_decay", [False, True], ids=["decays", "one-decay"])
def test_opcheck_selective_state_update(update_inputs, backend, one_decay, adapter_index):
    offset = torch.randn(6, 4) if adapter_index is None else torch.randn(3, 6, 4)
    if one_decay:
        update_inputs["A"] = update_inputs["A"][:, :1].expand(-1, 4)
    args = (*update_inputs.values(), None, None, True, offset, None, adapter_index, backend)
    opcheck(torch.ops.ssmtune.selective_state_update, args)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("groups", [None, 2], ids=["no-groups", "2-groups"])
@pytest.mark.parametrize("trained", [INPUTS, OFFSETS], ids=["all", "offsets"])
def test_compile_selective_scan(scan_inputs, backend, trained, groups, sizes):
    batch, dim, seqlen, dstate = sizes
    inputs = scan_inputs(batch, 2 * dim, seqlen, dstate, groups=groups)
    for name in trained:
        inputs[name].requires_grad_()

    def function(inputs):
        out, last_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
        return 2 * out, last_state

    def run(function):
        out, last_state = function(inputs)
        loss = out.square().sum() + last_state.sum()
        return out, last_state, *torch.autograd.grad(loss, [inputs[name] for name in trained])

    for name, a, b in zip(("out", "last_state", *trained), run(function), run(compiled(function)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")
        assert a.stride() == b.stride(), name


@pytest.mark.parametrize("trained", [INPUTS, OFFSETS], ids=["all", "offsets"])
@pytest.mark.parametrize("per_row", [(), ("initial_state", *OFFSETS)], ids=["shared", "per-sequence"])
def test_compile_selective_scan_packed(scan_inputs, backend, trained, per_row):
    first, *others = PACKED[backend == "triton"]
    inputs = scan_inputs(1, 20, first[-1], 8, per_row=per_row, rows=3)
    for name in trained:
        inputs[name].requires_grad_()

    def function(inputs, cu_seqlens):
        out, last_state = selective_scan(
            **inputs, delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens, backend=backend
        )
        return 2 * out, last_state

    fast = compiled(function)
    # the same graph for other lengths
    for bounds in (first, *others):
        cu_seqlens = torch.tensor(bounds)

        def run(function, cu_seqlens=cu_seqlens):
            out, last_state = function(inputs, cu_seqlens)
            loss = out.square().sum() + last_state.sum()
            return out, last_state, *torch.autograd.grad(loss, [inputs[name] for name in trained])

        for name, a, b in zip(("out", "last_state", *trained), run(function), run(fast), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("bounds", [[1, 9], [0, 5, 5, 9], [0, 12], [0, -3, 9]], ids=str)
def test_compiled_wrong_cu_seqlens_are_refused(scan_inputs, backend, bounds):
    # a graph cannot look at values: the kernel does
    if backend == "cuda-emulated":
        pytest.skip("to look at them would wait for the GPU")
    inputs = scan_inputs(1, 5, 9, 4)
    function = compiled(lambda inputs, cu_seqlens: selective_scan(**inputs, cu_seqlens=cu_seqlens, backend=backend))
    with pytest.raises((ValueError, RuntimeError), match="selective_scan: cu_seqlens"):
        function(inputs, torch.tensor(bounds))


def test_compile_follows_the_choice_of_backend(scan_inputs, monkeypatch):
    # a new choice compiles anew and is not ignored
    import ssmtune
    from ssmtune.ops import backends

    called, module = [], backends.implementation("reference")
    kernel = module.selective_scan_forward
    monkeypatch.setattr(module, "selective_scan_forward", lambda *args: called.append(1) or kernel(*args))
    inputs = scan_inputs(1, 5, 6, 4)
    function = compiled(lambda inputs: selective_scan(**inputs))
    function(inputs)
    before = len(called)
    with ssmtune.backend("reference"):
        function(inputs)
    assert len(called) == before + 1


def test_compile_causal_conv1d_and_update(conv_inputs, update_inputs, backend):
    convolve = compiled(lambda inputs: causal_conv1d(**inputs, activation="silu", backend=backend))
    expected = causal_conv1d(**conv_inputs, activation="silu", backend=backend)
    torch.testing.assert_close(convolve(conv_inputs), expected)

    state = update_inputs["state"].clone()
    expected = selective_state_update(**update_inputs | {"state": state}, dt_softplus=True, backend=backend)
    update = compiled(lambda inputs: selective_state_update(**inputs, dt_softplus=True, backend=backend))
    torch.testing.assert_close(update(update_inputs), expected)
    torch.testing.assert_close(update_inputs["state"], state)


def test_second_derivatives_are_refused(scan_inputs, conv_inputs, backend):
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(1, 3, 5, 2).items()}
    for x in conv_inputs.values():
        x.requires_grad_()
    for out, x, name in (
        (selective_scan(**inputs, backend=backend), inputs["u"], "selective_scan"),
        (causal_conv1d(**conv_inputs, activation="silu", backend=backend), conv_inputs["x"], "causal_conv1d"),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} has no second derivatives"):
            first.sum().backward()


def test_second_derivatives_of_the_reference(scan_inputs):
    inputs = scan_inputs(1, 2, 3, 2, dtype=torch.float64, optional=("z", "initial_state"))
    u, z = inputs["u"].requires_grad_(), inputs["z"].requires_grad_()

    def scan(u, z):
        return selective_scan_reference(**inputs | {"u": u, "z": z}, delta_softplus=True)

    assert torch.autograd.gradgradcheck(scan, (u, z))


def test_meta_tensors(scan_inputs):
    inputs = {name: x.to("meta") for name, x in scan_inputs(2, 5, 9, 4).items()}
    out, last_state = selective_scan(**inputs, return_last_state=True)
    assert out.shape == (2, 5, 9) and last_state.shape == (2, 5, 4) and out.device.type == "meta"


def test_direct_call_without_kept_states_says_so(scan_inputs, backend):
    inputs = [x.requires_grad_() for x in scan_inputs(1, 3, 5, 2).values()]
    with pytest.raises(RuntimeError, match="keep_states=False on tensors that need a gradient"):
        torch.ops.ssmtune.selective_scan_fwd(*inputs, None, True, False, backend)

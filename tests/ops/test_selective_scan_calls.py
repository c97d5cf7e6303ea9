"""What a call of selective_scan asks of its backend, keeps for the backward pass, and gives back."""

import pytest
import torch
from numerics import assert_close

from ssmtune.ops import backends, selective_scan
from ssmtune.ops.layout import dense_axis
from ssmtune.ops.selective_scan_op import INPUTS

SEQUENCES = ("u", "delta", "B", "C", "z")


@pytest.fixture
def spied(backend, monkeypatch):
    """The calls of the backend's kernels, as a list of (name, arguments)."""
    calls = []
    module = backends.implementation(backend)

    def spy(name):
        kernel = getattr(module, name)

        def call(*args):
            calls.append((name.removeprefix("selective_scan_"), args))
            return kernel(*args)

        monkeypatch.setattr(module, name, call)

    spy("selective_scan_forward")
    spy("selective_scan_backward")
    return calls


def run(inputs, backend, **kwargs):
    return selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend, **kwargs)


@pytest.mark.parametrize(
    "trained",
    [("u",), ("A", "D"), ("B", "C"), ("initial_state",), ("z", "state_offset"), ("delta", "output_offset"), INPUTS],
    ids="-".join,
)
def test_only_asked_gradients_are_computed(scan_inputs, backend, spied, trained, sizes):
    inputs = scan_inputs(*sizes)
    for name in trained:
        inputs[name].requires_grad_()
    out, last_state = run(inputs, backend)
    (out.sum() + last_state.sum()).backward()

    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in trained), name
    assert [name for name, _ in spied] == ["forward", "backward"]
    asked = spied[1][1][-1]
    assert {name for name, gradient in zip(INPUTS, asked, strict=True) if gradient is not None} == set(trained)


@pytest.mark.parametrize("trained", [("state_offset",), ("output_offset",), ("state_offset", "D")], ids="-".join)
def test_offsets_alone_skip_the_backward_scan(scan_inputs, backend, spied, trained, sizes):
    inputs = scan_inputs(*sizes)
    expected = {name: x.clone() for name, x in inputs.items()}
    for name in trained:
        inputs[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, _ = run(inputs, backend)
    out.sum().backward()

    assert [name for name, _ in spied] == ["forward"], "the backward scan ran"
    assert spied[0][1][-1] is None, "states were kept for a backward scan that does not come"
    kept = ("C", "z", *(("u",) if "D" in trained else ()))
    assert {x.data_ptr() for x in saved} == {inputs[name].data_ptr() for name in kept}
    # the same as with a scan
    for x in expected.values():
        x.requires_grad_()
    run(expected, backend)[0].sum().backward()
    for name in trained:
        assert_close(f"d{name}", expected[name].grad, inputs[name].grad, 2e-6)


def test_no_gradient_through_out_gives_zero_or_none(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes)
    inputs["state_offset"].requires_grad_()
    _, last_state = run(inputs, backend)
    # the state does not depend on the offset
    (gradient,) = torch.autograd.grad(last_state.sum(), inputs["state_offset"], allow_unused=True)
    assert gradient is None or not gradient.any()


def test_nothing_is_kept_without_gradients(scan_inputs, backend, spied, sizes):
    inputs = scan_inputs(*sizes)
    run(inputs, backend)
    for x in inputs.values():
        x.requires_grad_()
    with torch.no_grad():
        out, last_state = run(inputs, backend)
    assert not out.requires_grad and not last_state.requires_grad
    with torch.inference_mode():
        run(inputs, backend)
    for _, args in spied:
        assert args[-1] is None, "chunk states were allocated"


def test_saved_tensors_are_inputs_and_the_states_between_chunks(scan_inputs, native_kernels):
    batch, dim, seqlen, dstate = 2, 32, 256, 16
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(batch, dim, seqlen, dstate).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(inputs, "cpu")
    own = {x.data_ptr() for x in inputs.values()}
    extra = [x for x in saved if x.data_ptr() not in own]
    assert [tuple(x.shape) for x in extra] == [(batch, seqlen // 32 - 1, dim, dstate)]


def test_nothing_of_the_size_of_all_states_is_allocated(scan_inputs, native_kernels):
    from torch.utils._python_dispatch import TorchDispatchMode

    batch, dim, seqlen, dstate = 2, 32, 256, 16
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            results = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(results):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return results

    for trained in (INPUTS, ("state_offset",)):
        inputs = scan_inputs(batch, dim, seqlen, dstate)
        for name in trained:
            inputs[name].requires_grad_()
        with Watch():
            out, last_state = run(inputs, "cpu")
            (out.sum() + last_state.sum()).backward()
    assert 0 < largest <= 2 * batch * dim * seqlen, "all states take dstate times as much"


@pytest.mark.parametrize("layout", ["first", "last", "first-strided", "last-strided"])
def test_layout_is_kept_and_nothing_copied(scan_inputs, native_kernels, monkeypatch, layout):
    inputs = scan_inputs(2, 20, 70, 8, layouts=dict.fromkeys(SEQUENCES, layout))
    seen = {}
    kernel = torch.ops.ssmtune_native.selective_scan_fwd

    def spy(*args):
        seen.update({name: x.data_ptr() for name, x in zip(INPUTS, args, strict=False)})
        return kernel(*args)

    monkeypatch.setattr(torch.ops.ssmtune_native, "selective_scan_fwd", spy)
    out, _ = run({name: x.requires_grad_() for name, x in inputs.items()}, "cpu")
    assert seen == {name: x.data_ptr() for name, x in inputs.items()}

    gradients = dict(zip(inputs, torch.autograd.grad(out.square().sum(), list(inputs.values())), strict=True))
    for name, x in {"out": out, "du": gradients["u"], "ddelta": gradients["delta"], "dz": gradients["z"]}.items():
        assert (x.transpose(1, 2) if layout.startswith("last") else x).is_contiguous(), name


@pytest.mark.parametrize("sizes", [(3, 1, 1, 4), (2, 5, 1, 4), (2, 1, 6, 4)], ids=str)
def test_odd_strides(scan_inputs, backend, sizes):
    # an axis of size 1 may have any stride, and counts as contiguous with it
    batch, dim, seqlen, _ = sizes
    inputs = scan_inputs(*sizes)
    expected = run(inputs, backend)
    strides = {"u": (1, 7, 9), "delta": (dim * seqlen, seqlen, 9 if seqlen == 1 else 1)}
    if dim * seqlen > 1:
        strides["u"] = (60, 11, 3)
    for name, stride in strides.items():
        inputs[name] = torch.zeros(500).as_strided((batch, dim, seqlen), stride).copy_(inputs[name])
        assert 1 in dense_axis(inputs[name]).stride()[1:], "kernels are promised a dense axis"
    for a, b in zip(run(inputs, backend), expected, strict=True):
        assert torch.equal(a, b)


def test_rows_that_share_memory(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes)
    inputs["z"] = inputs["z"][:1].expand(2, -1, -1)
    expected = run(inputs | {"z": inputs["z"].clone()}, backend)
    for name, a, b in zip(("out", "last_state"), expected, run(inputs, backend), strict=True):
        assert_close(name, a, b, 1e-6)


def test_gradient_that_is_expanded(scan_inputs, backend, sizes):
    # sum() hands on a gradient whose strides are all 0
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(*sizes).items()}
    a = torch.autograd.grad(run(inputs, backend)[0].sum(), list(inputs.values()))
    out = run(inputs, backend)[0]
    b = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    for name, x, y in zip(inputs, a, b, strict=True):
        assert_close(f"d{name}", x, y, 1e-6)


@pytest.mark.parametrize("trained", [INPUTS, ("state_offset", "output_offset")], ids=["all", "offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(scan_inputs, native_kernels, trained, dtype):
    def results(threads):
        inputs = scan_inputs(3, 80, 200, 16, dtype=dtype)
        torch.set_num_threads(threads)
        for name in trained:
            inputs[name].requires_grad_()
        out, last_state = run(inputs, "cpu")
        (out.float().square().sum() + last_state.sum()).backward()
        return [out, last_state, *(inputs[name].grad for name in trained)]

    before = torch.get_num_threads()
    try:
        one, two, three = results(1), results(2), results(3)
    finally:
        torch.set_num_threads(before)
    for name, a, b, c in zip(("out", "last_state", *trained), one, two, three, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_casts(scan_inputs, backend, sizes):
    # activations take the dtype of u, parameters and states are float32, and gradients come back in their own dtype
    inputs = scan_inputs(*sizes)
    exact = run(inputs, backend)[0]
    inputs["u"] = inputs["u"].bfloat16()
    inputs["D"], inputs["state_offset"] = inputs["D"].bfloat16(), inputs["state_offset"].double()
    for x in inputs.values():
        x.requires_grad_()
    out, last_state = run(inputs, backend)
    assert out.dtype == torch.bfloat16 and last_state.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.2)
    out.sum().backward()
    for name, x in inputs.items():
        assert x.grad.dtype == x.dtype, name


def test_autocast(scan_inputs, backend, sizes):
    inputs = scan_inputs(*sizes)
    weight = torch.randn(sizes[1], sizes[1], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        # a projection in bfloat16 beside a step in float32
        inputs["u"] = (inputs["u"].transpose(1, 2) @ weight).transpose(1, 2)
        out, last_state = run(inputs, backend)
    assert out.dtype == torch.bfloat16 and last_state.dtype == torch.float32
    out.float().sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


def test_gradient_checkpointing(scan_inputs, backend, sizes):
    from torch.utils.checkpoint import checkpoint

    inputs = {name: x.requires_grad_() for name, x in scan_inputs(*sizes).items()}
    plain = torch.autograd.grad(run(inputs, backend)[0].square().sum(), list(inputs.values()))
    out = checkpoint(lambda: run(inputs, backend)[0], use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), list(inputs.values()))
    for name, a, b in zip(inputs, plain, again, strict=True):
        assert torch.equal(a, b), name

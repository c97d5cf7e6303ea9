"""causal_conv1d as PyTorch sees it: schemas, tracing and compilation."""

import pytest
import torch

from ssmtune.ops import causal_conv1d


def opcheck(op, args):
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.fixture(params=[False, True], ids=["rows", "packed"])
def inputs(request):
    rows = 1 if request.param else 2
    return {
        "x": torch.randn(rows, 9, 6).transpose(1, 2),
        "weight": torch.randn(6, 4),
        "bias": torch.randn(6),
        "initial_states": torch.randn(2, 6, 3),
        "cu_seqlens": torch.tensor([0, 2, 9]) if request.param else None,
    }


def trainable(inputs):
    return [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "initial_states")]


def test_opcheck(inputs, backend):
    tensors = tuple(inputs.values())
    opcheck(torch.ops.ssmtune.causal_conv1d_fwd, (*tensors, True, False, backend))
    dout, dfinal_states = torch.randn_like(inputs["x"]), torch.randn(2, 6, 3)
    for gradients in ((dout, None), (None, dfinal_states), (dout, dfinal_states)):
        opcheck(torch.ops.ssmtune.causal_conv1d_bwd, (*gradients, *tensors, True, [True, False, True, True], backend))
    trainable(inputs)
    opcheck(torch.ops.ssmtune.causal_conv1d_fwd, (*tensors, True, True, backend))


def test_compile(inputs, backend):
    trained = trainable(inputs)

    def function(inputs):
        out, states = causal_conv1d(**inputs, return_final_states=True, activation="silu", backend=backend)
        return 2 * out, states

    def run(function):
        out, states = function(inputs)
        return out, states, *torch.autograd.grad(out.square().sum() + states.sum(), trained)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(function), run(compiled), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
        assert a.stride() == b.stride()


def test_meta_tensors(inputs):
    inputs = {name: None if x is None else x.to("meta") for name, x in inputs.items()}
    out, states = causal_conv1d(**inputs, return_final_states=True)
    assert out.shape == inputs["x"].shape and states.shape == (2, 6, 3) and states.device.type == "meta"


@pytest.mark.parametrize("bounds", [[1, 9], [0, 5, 5, 9], [0, 12], [0, -3, 9]], ids=str)
def test_compiled_wrong_cu_seqlens_are_refused(backend, bounds):
    # a graph cannot look at values: the kernel does
    x, weight = torch.randn(1, 6, 9), torch.randn(6, 4)
    function = torch.compile(
        lambda cu_seqlens: causal_conv1d(x, weight, cu_seqlens=cu_seqlens, backend=backend), backend="aot_eager"
    )
    if backend == "cuda-emulated":
        # that one would wait for the GPU; it stays inside of its tensors, whatever it finds
        function(torch.tensor(bounds))
        return
    with pytest.raises((ValueError, RuntimeError), match="causal_conv1d: cu_seqlens"):
        function(torch.tensor(bounds))

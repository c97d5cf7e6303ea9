"""Any call of an operator gives the right result or an error in words: no crash, and no error from the inside."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ssmtune.ops import causal_conv1d, causal_conv1d_update, reference, selective_scan, selective_state_update

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8)
STRANGE = (None, 1.5, "cpu", [1.0], (), {}, object(), np.ones((2, 3), dtype=np.float32))
SIZES = {
    "batch": (1, 1, 2, 3),
    "dim": (1, 4, 16, 17, 40),
    "seqlen": (1, 2, 5, 65),
    "dstate": (1, 4, 8, 9),
    "width": (1, 2, 3, 4, 6),
}
ERROR_RATIO = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}

ROW = ("batch", "dim", "seqlen")
SCAN = {
    "u": ROW,
    "delta": ROW,
    "A": ("dim", "dstate"),
    "B": ("batch", "dstate", "seqlen"),
    "C": ("batch", "dstate", "seqlen"),
    "D": ("dim",),
    "z": ROW,
    "delta_bias": ("dim",),
    "initial_state": ("rows", "dim", "dstate"),
    "state_offset": ("rows", "dim", "dstate"),
    "output_offset": ("rows", "dim"),
}
UPDATE = {
    "state": ("batch", "dim", "dstate"),
    "x": ("batch", "dim"),
    "dt": ("batch", "dim"),
    "A": ("dim", "dstate"),
    "B": ("batch", "dstate"),
    "C": ("batch", "dstate"),
    "D": ("dim",),
    "z": ("batch", "dim"),
    "dt_bias": ("dim",),
    "state_offset": ("rows", "dim", "dstate"),
    "output_offset": ("rows", "dim"),
}
CONV = {"x": ROW, "weight": ("dim", "width"), "bias": ("dim",), "initial_states": ("sequences", "dim", "context")}
CONV_UPDATE = {
    "x": ("batch", "dim"),
    "conv_state": ("batch", "dim", "context"),
    "weight": ("dim", "width"),
    "bias": ("dim",),
}
SHARABLE = ("initial_state", "state_offset", "output_offset")
OPTIONAL = ("D", "z", "delta_bias", "dt_bias", "bias", "initial_states", *SHARABLE)
OVERWRITTEN = ("state", "conv_state")
fuzz = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    # shrinking a failure could take minutes
    phases=(Phase.generate,),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def lay_out(x, layout):
    """The same values in other memory; "expanded" repeats the first of an axis instead."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = x.new_zeros([2 * size for size in x.shape])
        return wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    if layout == "offset" and x.dim() >= 1:
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        return wide[..., 1 : 1 + x.shape[-1]].copy_(x)
    if layout == "expanded" and x.dim() >= 1 and x.shape[0] > 0:
        return x[:1].expand_as(x)
    return x


@st.composite
def tensors(draw, shape, dtype, name):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float64)
    x = x.clamp(-3, 3)
    if name == "A":
        x = -x.abs()
    if name in ("delta", "dt", "delta_bias", "dt_bias"):
        x = x.abs() / 4
    if draw(st.integers(0, 19)) == 0 and x.numel():
        x.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, 1e-40]))
    layouts = ("plain", "plain", "transposed", "sliced", "offset")
    return lay_out(x.to(dtype), draw(st.sampled_from(layouts if name in OVERWRITTEN else (*layouts, "expanded"))))


@st.composite
def mutated(draw, value):
    """Something else in the place of an argument."""
    kind = draw(st.sampled_from(("dtype", "float", "shape", "size", "empty", "strange", "meta", "sparse", "expanded")))
    if kind == "strange" or not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return draw(st.sampled_from(STRANGE))
    if value.is_sparse or value.dim() == 0:
        return draw(st.sampled_from(STRANGE))
    if kind == "dtype":
        return value.to(draw(st.sampled_from(OTHERS)))
    if kind == "float" and not value.is_complex():
        return value.to(draw(st.sampled_from(FLOATS)))
    if kind == "shape":
        value = value.transpose(0, -1) if draw(st.booleans()) else value
        return draw(st.sampled_from([value.unsqueeze(0), value.unsqueeze(-1), value.sum(-1), value.flatten(), value]))
    if kind in ("size", "empty"):
        axis = draw(st.integers(0, value.dim() - 1))
        shape = list(value.shape)
        shape[axis] = 0 if kind == "empty" else max(0, shape[axis] + draw(st.sampled_from((-1, 1, 7))))
        return value.new_ones(shape)
    if kind == "meta":
        return value.to("meta")
    if kind == "sparse":
        return value.to_sparse()
    return lay_out(value, "expanded")


@st.composite
def calls(draw, axes, flags, packable=False, stackable=False):
    sizes = {axis: draw(st.sampled_from(values)) for axis, values in SIZES.items()}
    packed = packable and draw(st.booleans())
    arguments = {}
    if packed:
        cuts = draw(st.sets(st.integers(1, sizes["seqlen"]), max_size=3))
        bounds = sorted(cuts | {0, sizes["seqlen"]})
        sizes["batch"] = 1
        arguments["cu_seqlens"] = torch.tensor(bounds, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    sizes["sequences"] = sizes["rows"] = len(bounds) - 1 if packed else sizes["batch"]
    sizes["context"] = sizes["width"] - 1
    main = draw(st.sampled_from(FLOATS))
    stacked = stackable and draw(st.booleans())
    if stacked:
        sizes["rows"] = draw(st.integers(1, 4))
        index = [draw(st.integers(-1, sizes["rows"] - 1)) for _ in range(sizes["batch"])]
        arguments["adapter_index"] = torch.tensor(index, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
        main = draw(st.sampled_from([dtype for dtype in FLOATS if dtype != torch.float64]))
    for name, shape in axes.items():
        if name in OPTIONAL and draw(st.booleans()):
            continue
        if name in SHARABLE and not stacked and draw(st.booleans()):
            shape = shape[1:]
        if name in ("B", "C") and draw(st.integers(0, 3)) == 0:
            shape = (shape[0], draw(st.sampled_from(("one", "dim"))), *shape[1:])
        dtype = main if draw(st.integers(0, 4)) else draw(st.sampled_from(FLOATS))
        if stacked and name in SHARABLE and draw(st.integers(0, 9)):
            dtype = torch.float32
        arguments[name] = draw(tensors([1 if axis == "one" else sizes[axis] for axis in shape], dtype, name))
    for flag in flags:
        arguments[flag] = draw(st.sampled_from((False, True)))
    if "weight" in axes:
        arguments["activation"] = draw(st.sampled_from((None, "silu", "swish")))
    names = list(arguments)
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        name = draw(st.sampled_from(names))
        if name == "activation":
            arguments[name] = draw(st.sampled_from(("relu", "", "SiLU", 3, ["silu"])))
        elif name == "cu_seqlens" and draw(st.booleans()):
            values = draw(st.lists(st.integers(-2, 70), max_size=5))
            arguments[name] = torch.tensor(values, dtype=torch.int64)
        elif name == "adapter_index" and draw(st.booleans()):
            arguments[name] = torch.tensor([draw(st.sampled_from((-(2**62), -2, 0, 4, 2**40)))] * sizes["batch"])
        elif name not in flags:
            arguments[name] = draw(mutated(arguments[name]))
    if draw(st.integers(0, 3)) == 0:
        backends = ("cpu", "reference", "auto", "cuda", "cpus", "", 3, ["cpu"])
        arguments["backend"] = draw(st.sampled_from(backends))
    return arguments, draw(st.booleans())


def floating(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


def attempt(operator, arguments):
    """Call the operator; None after an error of ours."""
    try:
        return operator(**arguments)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        message = str(error)
        assert message.startswith(f"{operator.__name__}: "), message
        assert re.fullmatch(r".+(\n  .+){1,3}", message), message
        return None


def check(operator, expect, call, states=()):
    """`expect` computes the results in float64; `states` are the arguments that the operator overwrites."""
    arguments, gradients = call
    numbers = floating(arguments)
    wide = {name: x.to(torch.float64, copy=True) if name in numbers else x for name, x in arguments.items()}
    wide.pop("backend", None)
    before = {name: x.clone() for name, x in numbers.items()}
    if gradients and not states:
        arguments = {name: x.detach().requires_grad_() if name in numbers else x for name, x in arguments.items()}
    with torch.set_grad_enabled(gradients):
        results = attempt(operator, arguments)
    after = floating(arguments)
    for name, x in before.items():
        if x.device.type == "cpu" and (name not in states or results is None):
            torch.testing.assert_close(
                after[name].detach(), x, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed"
            )
    if results is None:
        return False
    results = list(results) if isinstance(results, tuple) else [results]
    if any(result.device.type == "meta" for result in results):
        return True
    if gradients and not states:
        sum(result.float().sum() for result in results).backward()
        for name, x in floating(arguments).items():
            assert x.grad is None or (x.grad.shape == x.shape and x.grad.dtype == x.dtype), name
    if not all(
        x.isfinite().all() and x.abs().max() < 1e4 for x in wide.values() if isinstance(x, torch.Tensor) and x.numel()
    ):
        return True
    expected = expect(wide)
    actual = results + [arguments[name] for name in states]
    loosest = max(ERROR_RATIO[x.dtype] for x in numbers.values())
    for wanted, result in zip(expected + [wide[name] for name in states], actual, strict=True):
        assert result.shape == wanted.shape
        if result.numel() > 0:
            # arguments are around 1, so that is the scale of what cancels in a single number near 0
            error = (result.detach().double() - wanted).square().mean().sqrt()
            assert error <= loosest * wanted.square().mean().sqrt().clamp_min(1)
    return True


@pytest.fixture(scope="module")
def successes():
    """How many calls gave a result; a fuzzer whose calls all fail tests nothing."""
    counted = Counter()
    yield counted
    assert counted[True] > counted[False] / 4 > 0


@fuzz
@given(call=calls(SCAN, ("delta_softplus", "return_last_state"), packable=True))
def test_selective_scan(successes, call):
    def expect(arguments):
        both = arguments.pop("return_last_state")
        out, last_state = reference.selective_scan_reference(**arguments)
        return [out, last_state] if both else [out]

    successes[check(selective_scan, expect, call)] += 1


@fuzz
@given(call=calls(CONV, ("return_final_states",), packable=True))
def test_causal_conv1d(successes, call):
    def expect(arguments):
        both = arguments.pop("return_final_states")
        out, states = reference.causal_conv1d_reference(**arguments)
        return [out, states] if both else [out]

    successes[check(causal_conv1d, expect, call)] += 1


@fuzz
@given(call=calls(UPDATE, ("dt_softplus",), stackable=True))
def test_selective_state_update(successes, call):
    def expect(arguments):
        return [reference.selective_state_update_reference(**arguments)]

    successes[check(selective_state_update, expect, call, states=("state",))] += 1


@fuzz
@given(call=calls(CONV_UPDATE, ()))
def test_causal_conv1d_update(successes, call):
    def expect(arguments):
        return [reference.causal_conv1d_update_reference(**arguments)]

    successes[check(causal_conv1d_update, expect, call, states=("conv_state",))] += 1

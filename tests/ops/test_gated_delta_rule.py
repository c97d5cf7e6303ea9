"""The gated delta rule against its plain recurrence, and the identities that every implementation must satisfy."""

import pytest
import torch

from ssmtune.ops import gated_delta_rule

SEQUENCES = ("q", "k", "v", "g", "beta")
STATES = ("initial_state", "state_offset", "output_offset")
# batch, seqlen, key heads, heads, kdim, vdim: over two chunks with a decay for each head, five for each channel
SIZES = (2, 70, 2, 4, 6, 5)
NORMALISED = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}


def draw(sizes=SIZES, channels=False, per_row=False, rows=None, dtype=torch.float32, without=()):
    batch, seqlen, key_heads, heads, kdim, vdim = sizes
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    row = (rows or batch,) if per_row else ()
    values = {
        "q": normal(batch, seqlen, key_heads, kdim),
        "k": normal(batch, seqlen, key_heads, kdim),
        "v": normal(batch, seqlen, heads, vdim),
        "g": -normal(batch, seqlen, heads, *([kdim] if channels else [])).exp() / 4,
        # beyond 1 the state at a key changes its sign
        "beta": 2 * normal(batch, seqlen, heads).sigmoid(),
        "initial_state": normal(*row, heads, kdim, vdim),
        "state_offset": normal(*row, heads, kdim, vdim),
        "output_offset": normal(*row, heads, vdim),
    }
    wide = torch.promote_types(dtype, torch.float32)
    types = dict.fromkeys(("q", "k", "v"), dtype)
    return {name: x.to(types.get(name, wide)) for name, x in values.items() if name not in without}


def recurrence(q, k, v, g, beta, initial_state=None, state_offset=0.0, output_offset=0.0, normalise=True):
    """The rule as it is written, step by step in float64."""
    group = v.shape[2] // q.shape[2]
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    if normalise:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(group, dim=2) for x in (q / q.shape[-1] ** 0.5, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state if initial_state is None else state + initial_state.double()
    out = []
    for t in range(v.shape[1]):
        decay = g[:, t].exp()
        state = (decay.unsqueeze(-1) if g.dim() == 4 else decay[..., None, None]) * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        new = beta[:, t].unsqueeze(-1) * (v[:, t] - held)
        state = state + k[:, t].unsqueeze(-1) * new.unsqueeze(-2)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state + state_offset) + output_offset)
    return torch.stack(out, dim=1), state


def steps(inputs, start, stop):
    return {name: x[:, start:stop] if name in SEQUENCES else x for name, x in inputs.items()}


def gradients(results, inputs):
    random = torch.Generator().manual_seed(1)
    noise = [torch.randn(result.shape, generator=random, dtype=torch.float64) for result in results]
    loss = sum((result * each).sum() for result, each in zip(results, noise, strict=True))
    return torch.autograd.grad(loss, list(inputs.values()))


@pytest.fixture(params=[False, True], ids=["decay-of-heads", "decay-of-channels"])
def channels(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["shared", "per-row"])
def inputs(request, channels):
    return {name: x.requires_grad_() for name, x in draw(channels=channels, per_row=request.param).items()}


def assert_same(expected, actual, inputs, ratio, assert_close):
    for name, a, b in zip(("out", "state"), expected, actual, strict=True):
        assert_close(name, a, b, ratio)
    for name, a, b in zip(inputs, gradients(expected, inputs), gradients(actual, inputs), strict=True):
        assert_close(f"d{name}", a, b, 4 * ratio)


def test_equals_the_recurrence_with_gradients(inputs, assert_close):
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = recurrence(**exact)
    actual = gated_delta_rule(**inputs, **NORMALISED)
    assert [result.dtype for result in actual] == [torch.float32, torch.float32]
    for name, a, b in zip(("out", "state"), expected, actual, strict=True):
        assert_close(name, a, b, 2e-6)
    for name, a, b in zip(inputs, gradients(expected, exact), gradients(actual, inputs), strict=True):
        assert_close(f"d{name}", a, b, 4e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 16, 1, 3, 5, 7), (1, 65, 3, 3, 2, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes_and_dtypes(channels, sizes, dtype, assert_close):
    inputs = draw(sizes, channels, dtype=dtype, without=STATES)
    out, state = gated_delta_rule(**inputs, **NORMALISED)
    assert out.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    expected = recurrence(**inputs)
    rounding = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert_close("out", expected[0], out, rounding)
    assert_close("state", expected[1], state, min(rounding, 2e-6))


def test_without_normalisation_and_with_another_scale(channels, assert_close):
    inputs = draw((2, 20, 2, 2, 4, 3), channels)
    inputs["k"] = inputs["k"] / 3
    expected, _ = recurrence(**inputs, normalise=False)
    assert_close("out", expected, gated_delta_rule(**inputs), 2e-6)
    doubled = inputs | {"q": inputs["q"] / 2}
    assert_close("scaled", expected, gated_delta_rule(**doubled, scale=2 * 4**-0.5), 2e-6)


def test_gradcheck(channels):
    inputs = draw((1, 19, 1, 2, 3, 2), channels, per_row=True, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*tensors):
        return gated_delta_rule(**dict(zip(inputs, tensors, strict=True)), **NORMALISED)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_a_step_that_forgets_everything(channels, assert_close):
    inputs = draw(channels=channels)
    inputs["g"][:, 33] = -1e5
    for name, a, b in zip(
        ("out", "state"), recurrence(**inputs), gated_delta_rule(**inputs, **NORMALISED), strict=True
    ):
        assert_close(name, a, b, 2e-6)


@pytest.mark.parametrize("cuts", [(1,), (64,), (5, 6, 69)], ids=str)
def test_cutting_a_sequence_changes_nothing(channels, cuts, assert_close):
    inputs = {name: x.requires_grad_() for name, x in draw(channels=channels).items()}
    whole = gated_delta_rule(**inputs, **NORMALISED)
    state, pieces = inputs["initial_state"], []
    for start, stop in zip((0, *cuts), (*cuts, SIZES[1]), strict=True):
        out, state = gated_delta_rule(**steps(inputs, start, stop) | {"initial_state": state}, **NORMALISED)
        pieces.append(out)
    assert_same(whole, (torch.cat(pieces, dim=1), state), inputs, 2e-6, assert_close)


def test_one_token_at_a_time_is_the_whole(channels, assert_close):
    inputs = draw(channels=channels)
    expected, last = gated_delta_rule(**inputs, **NORMALISED)
    state, out = inputs["initial_state"], []
    for t in range(SIZES[1]):
        step, state = gated_delta_rule(**steps(inputs, t, t + 1) | {"initial_state": state}, **NORMALISED)
        out.append(step)
    assert_close("out", expected, torch.cat(out, dim=1), 2e-6)
    assert_close("state", last, state, 2e-6)


def test_the_offset_is_read_and_not_carried(inputs, assert_close):
    # a second set of heads that start at the offset and neither decay nor are written to
    expected = gated_delta_rule(**inputs, **NORMALISED)
    still = {"g": torch.zeros_like(inputs["g"]), "beta": torch.zeros_like(inputs["beta"])}
    still = {**inputs, **still, "initial_state": inputs["state_offset"]}
    del still["state_offset"]
    read, kept = gated_delta_rule(**still, **NORMALISED)
    assert torch.equal(kept, inputs["state_offset"].expand_as(kept))
    without = {name: x for name, x in inputs.items() if "offset" not in name}
    out, state = gated_delta_rule(**without, **NORMALISED)
    assert torch.equal(state, expected[1])
    assert_same(expected, (out + read, state), inputs, 2e-6, assert_close)


@pytest.mark.parametrize("per_row", [True, False], ids=["per-sequence", "shared"])
def test_packed_sequences_are_those_run_one_by_one(channels, per_row, assert_close):
    bounds = [0, 1, 35, 70]
    inputs = draw((1, *SIZES[1:]), channels, per_row, rows=3)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    packed = gated_delta_rule(**inputs, **NORMALISED, cu_seqlens=torch.tensor(bounds))
    results = []
    for i in range(3):
        own = steps(inputs, bounds[i], bounds[i + 1])
        own |= {name: inputs[name][i : i + 1] for name in STATES if per_row}
        results.append(gated_delta_rule(**own, **NORMALISED))
    outs, states = zip(*results, strict=True)
    assert_same(packed, (torch.cat(outs, dim=1), torch.cat(states)), inputs, 2e-6, assert_close)


def test_an_offset_alone_needs_no_backward_pass_of_the_rule(channels):
    inputs = draw(channels=channels)
    inputs["state_offset"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        gated_delta_rule(**inputs, **NORMALISED)
    assert len(saved) == 1


def test_autocast_leaves_the_state_in_float32(channels):
    inputs = draw(channels=channels)
    expected = gated_delta_rule(**inputs, **NORMALISED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gated_delta_rule(**inputs, **NORMALISED)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_compiles_to_one_graph(channels, assert_close):
    inputs = {name: x.requires_grad_() for name, x in draw((2, 20, 1, 2, 4, 3), channels).items()}
    torch.compiler.reset()
    compiled = torch.compile(
        lambda inputs: gated_delta_rule(**inputs, **NORMALISED), fullgraph=True, backend="aot_eager"
    )
    assert_same(gated_delta_rule(**inputs, **NORMALISED), compiled(inputs), inputs, 1e-6, assert_close)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": torch.zeros(2, 70, 3)}, r"beta has shape \(2, 70, 3\), expected \(batch, seqlen, nheads\) ="),
        ({"k": torch.zeros(2, 70, 3, 6)}, "k has 3 heads for 4 heads of v, expected a divisor"),
        ({"initial_state": torch.zeros(4, 5, 6)}, "The sizes are right in another order: transpose initial_state"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "v has batch 2, expected 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**draw() | changes)

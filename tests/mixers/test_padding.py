import pytest
import torch

KINDS = ("initial_state", "state_offset", "output_offset", "conv_state")


def padded(rows, side, seqlen):
    input_ids = torch.zeros(len(rows), seqlen, dtype=torch.long)
    mask = torch.zeros(len(rows), seqlen, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(seqlen - len(row), seqlen) if side == "left" else slice(0, len(row))
        input_ids[i, place] = row
        mask[i, place] = 1
    return input_ids, mask


@pytest.fixture
def rows(tokens):
    return [tokens(1, length)[0] for length in (1, 2, 5, 12)]


def worst_error(model, rows, side):
    input_ids, mask = padded(rows, side, 14)
    worst = 0.0
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            worst = max(worst, (logits[i][mask[i] == 1] - alone).abs().max().item())
    return worst


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "kinds", [(), *((kind,) for kind in KINDS), KINDS], ids=lambda kinds: "+".join(kinds) or "base"
)
def test_pads_change_nothing(make_pair, adapt, rows, side, use_bias, kinds):
    _, ours = make_pair(use_bias=use_bias)
    adapt(ours, *kinds)
    assert worst_error(ours, rows, side) < 2e-5


def test_the_bias_of_a_projection_leaks_from_pads_in_transformers(make_pair, rows):
    # The reason for the test above: should this one fail, transformers has been repaired.
    theirs, _ = make_pair(use_bias=True)
    assert worst_error(theirs, rows, "left") > 0.01


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_of_ones_is_no_mask(make_pair, tokens, dtype):
    _, ours = make_pair()
    with torch.no_grad():
        expected = ours(tokens(2, 9)).logits
        assert torch.equal(expected, ours(tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=dtype)).logits)


def test_gradients_ignore_pads(make_pair, adapt, rows, assert_close):
    _, ours = make_pair(use_bias=True)
    adapt(ours, *KINDS)
    input_ids, mask = padded(rows, "left", 14)
    (ours(input_ids, attention_mask=mask).logits.square() * mask[..., None]).sum().backward()
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    for row in rows:
        ours(row[None]).logits.square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, actual[name], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pads_leave_the_states_alone(make_pair, adapt, dtype, tokens):
    _, ours = make_pair()
    adapters = adapt(ours, "initial_state")
    with torch.no_grad():
        cache = ours.to(dtype)(
            tokens(2, 6), attention_mask=torch.tensor([[1] * 6, [0] * 6]), use_cache=True
        ).cache_params
    expected = adapters[0].tensors["initial_state"].float()
    assert torch.equal(cache.layers[0].recurrent_states[0][1], expected)
    assert not torch.equal(cache.layers[0].recurrent_states[0][0], expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_generation_from_left_padded_prompts(make_pair, adapt, rows, adapted):
    _, ours = make_pair(use_bias=True)
    if adapted:
        adapt(ours, *KINDS)
    input_ids, mask = padded(rows, "left", 12)
    together = ours.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 12:]
    for i, row in enumerate(rows):
        alone = ours.generate(row[None], max_new_tokens=8, do_sample=False)[0, len(row) :]
        assert torch.equal(alone, together[i])


def test_a_right_padded_prefix_leaves_the_state_of_its_tokens(make_pair, tokens, assert_close):
    _, ours = make_pair()
    row = tokens(1, 5)
    input_ids, mask = padded([row[0]], "right", 9)
    with torch.no_grad():
        expected = ours(row, use_cache=True).cache_params.layers[1].recurrent_states[0]
        actual = ours(input_ids, attention_mask=mask, use_cache=True).cache_params.layers[1].recurrent_states[0]
    assert_close("state", expected, actual, 1e-5)


def test_a_mask_that_covers_the_cached_tokens_too(make_pair, rows, assert_close):
    _, ours = make_pair(use_bias=True)
    input_ids, mask = padded(rows[2:], "left", 12)
    with torch.no_grad():
        expected = ours(input_ids, attention_mask=mask).logits
        first = ours(input_ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
        second = ours(input_ids[:, 9:], attention_mask=mask, cache_params=first.cache_params, use_cache=True)
    assert_close("logits", expected[:, 9:], second.logits, 1e-5)

import copy

import pytest
import torch
from transformers import DynamicCache

from ssmtune import ops
from ssmtune.mixers import find_mixers
from ssmtune.mixers.selective_mixer import SelectiveMixer

KINDS = ("initial_state", "state_offset", "output_offset")


def logits_in_pieces(model, input_ids, sizes):
    cache, pieces = None, []
    for piece in input_ids.split(sizes, dim=1):
        output = model(piece, cache_params=cache, use_cache=True)
        cache = output.cache_params
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_greedy_generation_with_and_without_a_cache(make_pair, adapt, tokens, prompt, adapted):
    theirs, ours = make_pair()
    if adapted:
        adapt(ours, *KINDS)
    input_ids = tokens(2, prompt)
    cached = ours.generate(input_ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(cached, ours.generate(input_ids, max_new_tokens=10, do_sample=False, use_cache=False))
    assert torch.equal(cached, theirs.generate(input_ids, max_new_tokens=10, do_sample=False)) is not adapted


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_beam_search_with_and_without_a_cache(make_pair, adapt, tokens, adapted):
    theirs, ours = make_pair()
    if adapted:
        adapt(ours, *KINDS)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cached = ours.generate(tokens(2, 5), **options)
    assert torch.equal(cached, ours.generate(tokens(2, 5), use_cache=False, **options))
    if not adapted:
        assert torch.equal(cached, theirs.generate(tokens(2, 5), **options))


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(
    "sizes", [[5, 7], [1, 1, 1, 9], [2, 2, 8], [1, 11], [11, 1], [1] * 12], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_a_sequence_in_pieces_equals_the_whole(make_pair, adapt, tokens, assert_close, sizes, adapted, grad):
    theirs, ours = make_pair()
    if adapted:
        adapt(ours, *KINDS)
    input_ids = tokens(2, 12)
    with torch.set_grad_enabled(grad):
        whole = ours(input_ids).logits
        assert_close("logits", whole, logits_in_pieces(ours, input_ids, sizes), 1e-5)
        if not adapted:
            assert_close("transformers", theirs(input_ids).logits, whole, 1e-5)


def test_continuation_with_several_tokens_is_wrong_in_transformers(make_pair, tokens):
    # The reason for the test above: should this one fail, transformers has been repaired.
    theirs, _ = make_pair()
    with torch.no_grad():
        error = (logits_in_pieces(theirs, tokens(2, 12), [5, 7]) - theirs(tokens(2, 12)).logits).abs().max()
    assert error > 0.01


def test_gradients_flow_through_the_cache(make_pair, adapt, tokens, assert_close):
    _, ours = make_pair()
    adapt(ours, *KINDS)
    input_ids = tokens(2, 12)
    # Only the loss of the last piece: what the first ones get, they get through the cache.
    logits = {"whole": ours(input_ids).logits[:, 8:], "pieces": logits_in_pieces(ours, input_ids, [3, 4, 1, 4])[:, 8:]}
    grads = {}
    for name, values in logits.items():
        ours.zero_grad()
        values.square().sum().backward()
        grads[name] = {parameter: tensor.grad.clone() for parameter, tensor in ours.named_parameters()}
    for name, grad in grads["whole"].items():
        assert_close(name, grad, grads["pieces"][name], 2e-5)


def test_gradients_of_states_put_into_a_cache(make_pair, tokens, assert_close):
    _, ours = make_pair(num_hidden_layers=1)
    with torch.no_grad():
        cache = ours(tokens(2, 6), use_cache=True).cache_params
    layer = cache.layers[0]
    layer.recurrent_states[0] = state = layer.recurrent_states[0].clone().requires_grad_(True)
    layer.conv_states[0] = window = layer.conv_states[0].clone().requires_grad_(True)
    for size in (1, 4):
        piece = copy.deepcopy(cache)
        piece.layers[0].recurrent_states[0], piece.layers[0].conv_states[0] = state, window
        before = state.detach().clone()
        state.grad = window.grad = None
        ours(tokens(2, size), cache_params=piece, use_cache=True).logits.square().sum().backward()
        assert torch.equal(state, before)
        assert piece.layers[0].recurrent_states[0] is not state
        assert state.grad.abs().min() > 0 and window.grad[..., 1:].abs().min() > 0


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_continues_from_a_cache_made_in_inference_mode(make_pair, tokens, assert_close, size, grad):
    _, ours = make_pair()
    input_ids = tokens(2, 5 + size)
    with torch.inference_mode():
        cache = ours(input_ids[:, :5], use_cache=True).cache_params
    with torch.set_grad_enabled(grad):
        logits = ours(input_ids[:, 5:], cache_params=cache, use_cache=True).logits
        assert_close("logits", ours(input_ids).logits[:, 5:], logits, 1e-5)
    if grad:
        logits.sum().backward()


def test_an_initial_state_is_what_a_cache_holding_it_gives(make_pair, adapt, tokens, assert_close):
    theirs, ours = make_pair()
    adapters = adapt(ours, "initial_state")
    cache = DynamicCache(config=ours.config)
    for (_, mixer), adapter in zip(find_mixers(ours), adapters, strict=True):
        cache.update_conv_state(torch.zeros(1, mixer.intermediate_size, 4), mixer.layer_idx, conv_kernel_size=4)
        cache.update_recurrent_state(adapter.tensors["initial_state"].detach()[None], mixer.layer_idx)
    with torch.no_grad():
        # One token at a time, the only way in which transformers starts from a cached state.
        expected = logits_in_pieces_from(theirs, cache, tokens(1, 6))
        assert_close("logits", expected, ours(tokens(1, 6)).logits, 1e-5)


def logits_in_pieces_from(model, cache, input_ids):
    steps = [model(token, cache_params=cache, use_cache=True).logits for token in input_ids.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def test_a_reset_cache_starts_from_the_initial_state_again(make_pair, adapt, tokens, assert_close):
    _, ours = make_pair()
    adapt(ours, "initial_state")
    with torch.no_grad():
        first = ours(tokens(1, 6), use_cache=True)
        expected = first.logits.clone()
        first.cache_params.reset()
        again = ours(tokens(1, 6), cache_params=first.cache_params, use_cache=True)
    assert_close("logits", expected, again.logits, 1e-7)


def test_a_cache_that_records_the_past(make_pair, tokens, assert_close):
    _, ours = make_pair()
    cache = DynamicCache(config=ours.config)
    cache.activate_past_recording()
    input_ids = tokens(2, 9)
    with torch.no_grad():
        pieces = [ours(piece, cache_params=cache, use_cache=True).logits for piece in input_ids.split([2, 1, 6], dim=1)]
        assert_close("logits", ours(input_ids).logits, torch.cat(pieces, dim=1), 1e-5)
    assert cache.layers[0].conv_states[0].shape[-1] == 9


def test_a_step_updates_the_cached_states_in_place(make_pair, tokens, monkeypatch):
    theirs, ours = make_pair()
    updated = []
    update = ops.selective_state_update
    monkeypatch.setattr(
        ops, "selective_state_update", lambda *args, **kw: updated.append(args[0]) or update(*args, **kw)
    )
    with torch.no_grad():
        cache = ours(tokens(2, 6), use_cache=True).cache_params
        expected = copy.deepcopy(cache)
        states = [cache.layers[layer].recurrent_states[0] for layer in range(2)]
        windows = [cache.layers[layer].conv_states[0] for layer in range(2)]
        before = [state.clone() for state in states]
        ours(tokens(2, 1), cache_params=cache, use_cache=True)
        theirs(tokens(2, 1), cache_params=expected, use_cache=True)
    for layer in range(2):
        assert cache.layers[layer].recurrent_states[0] is states[layer]
        assert updated[layer].data_ptr() == states[layer].data_ptr()
        assert not torch.equal(states[layer], before[layer])
        assert cache.layers[layer].conv_states[0] is windows[layer]
        # The first column is one that no convolution looks at any more.
        torch.testing.assert_close(windows[layer][..., 1:], expected.layers[layer].conv_states[0][..., 1:])


def test_a_step_of_mamba_in_heads_updates_the_cached_states_in_place(
    make_pair, adapt, tokens, assert_close, monkeypatch
):
    _, ours = make_pair("zamba")
    mixers = find_mixers(ours)
    adapt(ours, "state_offset", "output_offset")
    input_ids = tokens(2, 7)
    with torch.no_grad():
        expected = ours(input_ids).logits[:, 6:]
        cache = ours(input_ids[:, :6], use_cache=True).past_key_values
        states = [cache.layers[mixer.layer_idx].recurrent_states[0] for _, mixer in mixers]
        before = [state.clone() for state in states]
        monkeypatch.setattr(SelectiveMixer, "scan_operator", None)
        actual = ours(input_ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert_close("logits", expected, actual, 1e-5)
    for (_, mixer), state, old in zip(mixers, states, before, strict=True):
        assert cache.layers[mixer.layer_idx].recurrent_states[0] is state
        assert not torch.equal(state, old)


@pytest.mark.parametrize("conv_kernel", [1, 2, 3])
def test_generation_with_short_convolutions(make_pair, tokens, conv_kernel):
    theirs, ours = make_pair(conv_kernel=conv_kernel)
    for prompt in (1, 4):
        cached = ours.generate(tokens(2, prompt), max_new_tokens=6, do_sample=False)
        expected = ours.generate(tokens(2, prompt), max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, expected)
        assert torch.equal(cached, theirs.generate(tokens(2, prompt), max_new_tokens=6, do_sample=False))

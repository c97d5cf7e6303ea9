import copy

import pytest
import torch

from ssmtune.mixers import find_mixers


def loss_and_gradients(model, input_ids):
    model.zero_grad()
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"conv_kernel": 2},
        {"state_size": 5, "expand": 3},
        {"hidden_act": "gelu"},
        {"residual_in_fp32": False},
    ],
    ids=["plain", "bias", "no-conv-bias", "K2", "N5-expand3", "gelu", "residual-half"],
)
def test_forward_and_gradients_equal_transformers(make_pair, tokens, assert_close, config, training):
    theirs, ours = make_pair(**config)
    input_ids = tokens(2, 13)
    expected, expected_grads = loss_and_gradients(theirs.train(training), input_ids)
    actual, actual_grads = loss_and_gradients(ours.train(training), input_ids)
    assert_close("logits", expected.logits, actual.logits, 1e-5)
    assert_close("loss", expected.loss, actual.loss, 1e-6)
    assert expected_grads.keys() == actual_grads.keys()
    for name, grad in expected_grads.items():
        assert_close(name, grad, actual_grads[name], 2e-5)


def test_gradients_are_right_when_only_one_parameter_trains(make_pair, tokens, assert_close):
    theirs, ours = make_pair()
    input_ids = tokens(2, 7)
    _, expected = loss_and_gradients(theirs, input_ids)
    for name, _ in ours.named_parameters():
        one = copy.deepcopy(ours).requires_grad_(False)
        one.get_parameter(name).requires_grad_(True)
        _, actual = loss_and_gradients(one, input_ids)
        assert_close(name, expected[name], actual[name], 2e-5)


def test_bfloat16_is_no_further_from_float32_than_transformers(make_pair, tokens):
    theirs, ours = make_pair()
    theirs, ours = theirs.to(torch.bfloat16), ours.to(torch.bfloat16)
    input_ids = tokens(4, 40)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).float()(input_ids).logits
        their_error = (theirs(input_ids).logits - exact).square().mean().sqrt()
        our_error = (ours(input_ids).logits - exact).square().mean().sqrt()
    assert our_error <= 1.1 * their_error
    assert our_error <= 0.02 * exact.square().mean().sqrt()


def test_bfloat16_gradients(make_pair, tokens, assert_close):
    theirs, ours = make_pair()
    input_ids = tokens(2, 13)
    _, expected = loss_and_gradients(theirs, input_ids)
    _, actual = loss_and_gradients(ours.to(torch.bfloat16), input_ids)
    for name, grad in expected.items():
        assert actual[name].dtype == torch.bfloat16
        assert_close(name, grad, actual[name].float(), 0.06)


def test_autocast(make_pair, tokens, assert_close):
    theirs, ours = make_pair()
    input_ids = tokens(2, 13)
    expected, _ = loss_and_gradients(theirs, input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ours(input_ids, labels=input_ids)
    actual.loss.backward()
    assert_close("logits", expected.logits, actual.logits, 0.03)
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_projections_are_called_as_modules(make_pair, tokens):
    _, ours = make_pair(num_hidden_layers=1)
    mixer = find_mixers(ours)[0][1]
    called = []
    for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
        mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    ours(tokens(1, 5))
    assert called == ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]


@pytest.mark.parametrize("seqlen", [1, 2, 11])
def test_hooked_convolution_and_time_step_change_nothing(make_pair, tokens, assert_close, seqlen):
    # A hook sends the mixer down the paths that call these modules instead of reading their parameters.
    theirs, ours = make_pair(use_bias=True)
    for _, mixer in find_mixers(ours):
        for module in (mixer.conv1d, mixer.dt_proj):
            module.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        cache = theirs(tokens(2, 6), use_cache=True).cache_params
        assert_close("prefill", theirs(tokens(2, seqlen)).logits, ours(tokens(2, seqlen)).logits, 1e-5)
        expected = torch.cat([tokens(2, 6), tokens(2, seqlen)], dim=1)
        actual = ours(tokens(2, seqlen), cache_params=cache, use_cache=True).logits
        assert_close("continuation", theirs(expected).logits[:, 6:], actual, 1e-5)


def test_rejects_a_mask_of_another_size(make_pair, tokens):
    _, ours = make_pair()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\), expected \(batch, seqlen\) = \(2, 5\)"):
        ours(tokens(2, 5), attention_mask=torch.ones(2, 4))

"""The learned convolution state: what it does to a model, its gradient, pads and packed sequences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

import ssmtune
from ssmtune.tuners import InitialStateConfig, InitialStateLayer

CONFIG = {"conv_state": True, "task_type": "CAUSAL_LM"}


def tensors(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_its_shape_and_number(tiny_mamba):
    model = get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG))
    layer = next(m for m in model.modules() if isinstance(m, InitialStateLayer))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "initial_state_h.default": (64, 8),
        "initial_state_conv.default": (64, 3),
    }
    assert model.get_nb_trainable_parameters()[0] == 2 * 64 * (8 + 3)


def test_a_rank_leaves_it_whole(tiny_mamba):
    model = get_peft_model(tiny_mamba, InitialStateConfig(rank=2, **CONFIG))
    assert model.get_nb_trainable_parameters()[0] == 2 * (64 * 2 + 2 * 8 + 64 * 3)


def plain_mixer(mixer, hidden, h_0, conv):
    """The mixer of transformers, step by step, from an initial state and what the convolution sees first."""
    x, z = mixer.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
    x = torch.cat([conv.expand(len(x), -1, -1), x], dim=-1)
    u = F.silu(F.conv1d(x, mixer.conv1d.weight, mixer.conv1d.bias, groups=len(conv)))
    dt, B, C = mixer.x_proj(u.transpose(1, 2)).split([mixer.time_step_rank, 8, 8], dim=-1)
    delta, h, ys = F.softplus(mixer.dt_proj(dt)), h_0.expand(len(x), -1, -1), []
    for t in range(u.shape[-1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * -mixer.A_log.exp()) * h + step * B[:, t, None] * u[:, :, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, :, t])
    return mixer.out_proj(torch.stack(ys, dim=1) * F.silu(z.transpose(1, 2)))


@pytest.mark.parametrize("seqlen", [1, 2, 7])
def test_effect_and_gradients_are_those_of_the_plain_recurrence(tiny_mamba, make_nonzero, assert_close, seqlen):
    make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG)))
    mixer = tiny_mamba.backbone.layers[0].mixer
    h_0, conv = (mixer.start_adapter.tensors(kind)["default"] for kind in ("h", "conv"))
    hidden = torch.randn(2, seqlen, 32, requires_grad=True)
    weights = torch.randn(2, seqlen, 32)
    expected, actual = plain_mixer(mixer, hidden, h_0, conv), mixer(hidden)
    assert_close("output", expected, actual, 1e-5)
    gradients = [torch.autograd.grad((out * weights).sum(), (h_0, conv, hidden)) for out in (expected, actual)]
    for name, wanted, got in zip(("h", "conv", "hidden"), *gradients, strict=True):
        assert_close(name, wanted, got, 1e-5)


@pytest.mark.parametrize("pads", [1, 2, 3, 6])
def test_left_pads_change_neither_logits_nor_gradients(tiny_mamba, make_nonzero, input_ids, assert_close, pads):
    model = make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG)))
    results = []
    for width in (0, pads):
        # the first row as it is, the second with pads
        model.zero_grad()
        rows = torch.cat([torch.zeros(2, width, dtype=torch.long), input_ids], dim=1)
        rows[0] = F.pad(input_ids[0], (0, width))
        mask = torch.ones_like(rows)
        mask[1, :width] = 0
        logits = model(input_ids=rows, attention_mask=mask).logits
        real = torch.cat([logits[0, :9], logits[1, width:]])
        real.square().mean().backward()
        results.append([real, *(p.grad.clone() for p in tensors(model).values())])
    for expected, actual in zip(*results, strict=True):
        assert_close("padded", expected, actual, 1e-5)


def test_generation_from_prompts_shorter_than_the_convolution(tiny_mamba, make_nonzero):
    model = make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG))).eval()
    rows, mask = torch.tensor([[5, 9, 3], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    together = model.generate(input_ids=rows, attention_mask=mask, **options)[:, 3:]
    for row, prompt in enumerate((rows[:1], rows[1:, 2:])):
        alone = [model.generate(input_ids=prompt, use_cache=cache, **options)[0, -6:] for cache in (True, False)]
        assert torch.equal(alone[0], alone[1]) and torch.equal(alone[0], together[row])


def test_it_compiles_with_pads(tiny_mamba, make_nonzero, input_ids):
    model = make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG)))
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual = compiled(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_lora_on_the_convolution_sees_it_too(tiny_mamba, make_nonzero, input_ids, logits, assert_close):
    ssmtune.patch(tiny_mamba)
    model = make_nonzero(get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG)))
    expected = logits(model, input_ids)
    for layer in tiny_mamba.backbone.layers:
        # a hook makes the mixer call the module rather than read its weights
        layer.mixer.conv1d.register_forward_hook(lambda module, args, output: None)
    assert_close("logits", expected, logits(model, input_ids), 1e-5)


def test_without_it_the_convolution_starts_from_zeros(tiny_mamba, input_ids, logits, make_nonzero):
    plain = make_nonzero(get_peft_model(copy.deepcopy(tiny_mamba), InitialStateConfig()))
    model = get_peft_model(tiny_mamba, InitialStateConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in tensors(plain).items():
            model.get_parameter(name).copy_(parameter)
    assert torch.equal(logits(model, input_ids), logits(plain, input_ids))

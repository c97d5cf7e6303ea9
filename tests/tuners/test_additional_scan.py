"""States beside those of a mixer."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

import ssmtune
from ssmtune import AdditionalScanConfig, InitialStateConfig, StateOffsetConfig
from ssmtune.mixers import find_mixers

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model(tiny_mamba):
    torch.nn.init.normal_(tiny_mamba.backbone.layers[0].mixer.A_log)
    return get_peft_model(tiny_mamba, AdditionalScanConfig(states=3, task_type="CAUSAL_LM"))


def test_states_start_as_the_slowest_of_the_model_and_are_not_read(model):
    for _, mixer in find_mixers(model):
        layer = mixer.scan_adapter
        assert torch.equal(layer.additional_scan_A_log["default"], mixer.A_log[:, :1].expand(-1, 3))
        assert not layer.additional_scan_C["default"].any()
        assert layer.additional_scan_B["default"].std() > 0.01


def test_it_is_a_second_scan_of_the_same_input(model, make_nonzero, assert_close):
    """y gains the output of a scan with the adapter's A, B and C and the mixer's u and time step, in float64."""
    make_nonzero(model, std=0.5)
    mixer = find_mixers(model)[0][1]
    layer, seen = mixer.scan_adapter, {}
    scan = type(mixer).scan_operator

    def watched(u, delta, *args, **kwargs):
        seen.update(u=u, delta=delta, bias=kwargs["delta_bias"], z=kwargs["z"])
        seen["y"] = scan(u, delta, *args, **kwargs)
        return seen["y"]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(mixer), "scan_operator", staticmethod(watched))
        hidden = torch.randn(2, 7, 32)
        mixer(hidden)
        added = seen["y"]
        layer._disable_adapters = True
        mixer(hidden)
    actual = added - seen["y"]
    u, delta = seen["u"].double(), F.softplus(seen["delta"].double() + seen["bias"].double()[:, None])
    A = -layer.additional_scan_A_log["default"].double().exp()
    B, C = (torch.einsum("kd,bdl->bkl", layer.tensors(kind)["default"].double(), u) for kind in "BC")
    state, expected = torch.zeros(2, 64, 3, dtype=torch.float64), []
    for t in range(7):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[:, None, :, t] * u[:, :, t, None]
        expected.append((state * C[:, None, :, t]).sum(-1) * F.silu(seen["z"][:, :, t].double()))
    assert_close("output", torch.stack(expected, dim=-1), actual, 1e-5)


def test_gradients_are_those_of_finite_differences(model, make_nonzero, assert_close):
    make_nonzero(model, std=0.5).double()
    mixer = find_mixers(model)[0][1]
    hidden, weight = torch.randn(2, 2, 7, 32, dtype=torch.float64)
    (mixer(hidden) * weight).sum().backward()
    for name, parameter in mixer.scan_adapter.named_parameters():
        step, sums = torch.randn_like(parameter), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * 1e-2 * step)
                sums.append((mixer(hidden) * weight).sum())
                parameter.sub_(sign * 1e-2 * step)
        assert_close(name, (sums[0] - sums[1]) / 2e-2, (parameter.grad * step).double().sum(), 1e-3)


def test_beside_the_state_methods(model, tiny_mamba, make_nonzero):
    get_peft_model(tiny_mamba, InitialStateConfig(conv_state=True), adapter_name="start")
    both = get_peft_model(tiny_mamba, StateOffsetConfig(task_type="CAUSAL_LM"), adapter_name="shift")
    make_nonzero(both, std=0.5)
    input_ids = torch.randint(0, 64, (2, 6))
    assert torch.equal(*(both.generate(input_ids=input_ids, **GREEDY, use_cache=cache) for cache in (True, False)))


def test_a_text_becomes_an_initial_state_beside_it(model, tiny_mamba):
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[:, 3:]
    both = get_peft_model(tiny_mamba, InitialStateConfig(conv_state=True), adapter_name="start")
    ssmtune.initial_state_from_text(both, lambda text: {"input_ids": [5, 6, 7]}, "a text")
    with torch.no_grad():
        torch.testing.assert_close(both(input_ids=torch.tensor([[8, 9]])).logits, expected)


def test_adapters_with_other_numbers_of_states(model, make_nonzero, tmp_path):
    model.add_adapter("wide", AdditionalScanConfig(states=5))
    model.set_requires_grad(["default", "wide"])
    make_nonzero(model, std=0.5).eval()
    rows = torch.randint(0, 64, (3, 6))
    names = ["wide", "__base__", "default"]
    together = model.generate(input_ids=rows, adapter_names=names, **GREEDY)
    assert torch.equal(together, model.generate(input_ids=rows, adapter_names=names, use_cache=False, **GREEDY))
    for name, row in (("wide", 0), ("default", 2)):
        model.set_adapter(name)
        assert torch.equal(together[row], model.generate(input_ids=rows[row : row + 1], **GREEDY)[0])
    model.save_pretrained(tmp_path)
    expected = model(input_ids=rows).logits
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(input_ids=rows).logits, expected)


@pytest.mark.parametrize("states", [0, -1, 1.5, "3"])
def test_a_wrong_number_of_states_is_refused(states):
    with pytest.raises(ValueError, match="states must be an integer of at least 1") as error:
        AdditionalScanConfig(states=states)
    assert len(str(error.value).splitlines()) == 2


def test_trainable_parameters_of_the_released_sizes():
    for hidden, layers, expected in [(768, 24, 884_736), (2048, 48, 4_718_592)]:
        with torch.device("meta"):
            base = MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=hidden, num_hidden_layers=layers))
        assert get_peft_model(base, AdditionalScanConfig()).get_nb_trainable_parameters()[0] == expected

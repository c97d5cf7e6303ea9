"""State offsets that virtual tokens leave behind."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from ssmtune import StateOffsetConfig
from ssmtune.mixers import find_mixers

INPUT_IDS = torch.arange(12).view(2, 6)


def adapted(model, hidden=None):
    config = StateOffsetConfig(task_type="CAUSAL_LM", virtual_tokens=4, reparametrize=hidden)
    model = get_peft_model(model, config)
    for _, mixer in find_mixers(model):
        virtual = mixer.offset_adapter.virtual_tokens["default"]
        if virtual.outer is not None:
            torch.nn.init.normal_(virtual.outer.weight)
    return model


@pytest.mark.parametrize("hidden", [None, 5])
def test_the_offset_is_the_state_after_the_virtual_tokens(tiny_mamba, assert_close, tmp_path, hidden):
    """That this is what a mixer keeps of tokens before a text, test_prefix.py checks."""
    model = adapted(tiny_mamba, hidden)
    actual = model(input_ids=INPUT_IDS).logits
    offsets = []
    for _, mixer in find_mixers(model):
        virtual = mixer.offset_adapter.virtual_tokens["default"]
        tokens = virtual.tokens
        if hidden is not None:
            tokens = tokens + virtual.outer(torch.tanh(virtual.inner(tokens)))
        offsets.append(mixer.states_after(tokens[None])[0][0].detach())
    model.save_pretrained(tmp_path)
    plain = get_peft_model(model.unload(), StateOffsetConfig(task_type="CAUSAL_LM"))
    for (_, mixer), offset in zip(find_mixers(plain), offsets, strict=True):
        mixer.offset_adapter.assign("h", "default", offset)
    assert_close("logits", plain(input_ids=INPUT_IDS).logits, actual, 1e-5)
    loaded = PeftModel.from_pretrained(plain.unload(), tmp_path)
    assert loaded.peft_config["default"].virtual_tokens is None
    names = {name.split(".")[-2] for name, _ in loaded.named_parameters() if "offset_adapter" in name}
    assert names == {"state_offset_h"}
    with torch.no_grad():
        assert_close("folded", actual, loaded(input_ids=INPUT_IDS).logits, 1e-5)


def test_the_offset_of_every_token_is_the_same(tiny_mamba):
    """Nothing of the virtual tokens is carried on: the states that a text leaves are those of the base."""
    model = adapted(tiny_mamba)
    with torch.no_grad():
        first = model(input_ids=INPUT_IDS, use_cache=True).cache_params.layers[0].recurrent_states[0].clone()
        with model.disable_adapter():
            base = model(input_ids=INPUT_IDS, use_cache=True).cache_params.layers[0].recurrent_states[0]
    assert torch.equal(first, base)


def test_it_does_not_go_with_an_output_offset():
    with pytest.raises(ValueError, match="virtual_tokens=4 does not go with target 'y'") as error:
        StateOffsetConfig(target="y", virtual_tokens=4)
    assert len(str(error.value).splitlines()) == 2

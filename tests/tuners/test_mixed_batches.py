"""One batch whose rows have different adapters."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

import ssmtune
from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

NAMES = ["one", "__base__", "two", "one"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def rows():
    return torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(0))


def build(model, configs, make_nonzero):
    model = get_peft_model(model, configs[0], adapter_name="one")
    model.add_adapter("two", configs[1])
    model.set_requires_grad(["one", "two"])
    return make_nonzero(model, std=2.0).eval()


@pytest.fixture
def model(tiny_mamba, make_config, make_nonzero):
    return build(tiny_mamba, [make_config(task_type="CAUSAL_LM") for _ in range(2)], make_nonzero)


def apart(model, rows, run):
    """The result for each row with its own adapter alone."""
    results = []
    for name, row in zip(NAMES, rows, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(row[None]))
        else:
            model.set_adapter(name)
            results.append(run(row[None]))
    return torch.cat(results)


def test_each_row_has_its_adapter(model, rows, logits):
    actual = logits(model, rows, adapter_names=NAMES)
    torch.testing.assert_close(actual, apart(model, rows, lambda row: logits(model, row)))
    model.set_adapter("two")
    assert torch.equal(logits(model, rows, adapter_names=NAMES), actual)
    assert not torch.equal(logits(model, rows), actual)
    base = logits(model, rows, adapter_names=["__base__"] * 4)
    with model.disable_adapter():
        torch.testing.assert_close(base, logits(model, rows))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(model, rows, num_beams):
    def generate(input_ids, **kwargs):
        return model.generate(input_ids=input_ids, num_beams=num_beams, **GREEDY, **kwargs)

    actual = generate(rows, adapter_names=NAMES)
    assert torch.equal(actual, apart(model, rows, generate))
    config = GenerationConfig(**GREEDY, num_beams=num_beams, pad_token_id=0)
    assert torch.equal(model.generate(input_ids=rows, generation_config=config, adapter_names=NAMES), actual)


def test_generation_stacks_the_adapters_once(tiny_mamba, make_nonzero, rows, monkeypatch):
    model = build(tiny_mamba, [StateOffsetConfig(task_type="CAUSAL_LM") for _ in range(2)], make_nonzero)
    update, seen = ssmtune.ops.selective_state_update, []

    def watched(*args, **kwargs):
        seen.append((kwargs["state_offset"], kwargs["adapter_index"].tolist()))
        return update(*args, **kwargs)

    monkeypatch.setattr(ssmtune.ops, "selective_state_update", watched)
    model.generate(input_ids=rows, adapter_names=NAMES, **GREEDY)
    assert len(seen) == 5 * 2
    assert all(stack.shape == (2, 64, 8) and index == [0, -1, 1, 0] for stack, index in seen)
    assert len({id(stack) for stack, _ in seen}) == 2


def test_beside_an_adapter_that_all_rows_share(tiny_mamba, make_nonzero, rows, logits):
    get_peft_model(tiny_mamba, InitialStateConfig(task_type="CAUSAL_LM"), adapter_name="shared")
    model = build(tiny_mamba, [StateOffsetConfig(task_type="CAUSAL_LM") for _ in range(2)], make_nonzero)
    actual = model.generate(input_ids=rows, adapter_names=NAMES, **GREEDY)
    for row, name, expected in zip(rows, NAMES, actual, strict=True):
        assert torch.equal(model.generate(input_ids=row[None], adapter_names=[name], **GREEDY)[0], expected)
    mixed = logits(model, rows, adapter_names=NAMES)
    first = logits(model, rows[1:2], adapter_names=["one"])
    assert not torch.equal(mixed[1:2], first)


def test_left_pads(model, rows, logits):
    mask = torch.ones_like(rows)
    mask[0, :3] = mask[1, :1] = 0
    actual = logits(model, rows * mask, attention_mask=mask, adapter_names=NAMES)
    for index, (row, kept) in enumerate(zip(rows, mask.bool(), strict=True)):
        expected = logits(model, row[kept][None], adapter_names=[NAMES[index]])[0]
        torch.testing.assert_close(actual[index][kept], expected)


def test_what_is_packed_into_a_row_has_its_adapter(tiny_mamba, make_state_config, make_nonzero, rows, logits):
    model = build(tiny_mamba, [make_state_config() for _ in range(2)], make_nonzero)
    positions = torch.tensor([*range(4), *range(5)]).expand(4, -1)
    actual = logits(model, rows, position_ids=positions, adapter_names=NAMES, use_cache=False)
    for part in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(actual[:, part], apart(model, rows[:, part], lambda row: logits(model, row)))


@pytest.mark.parametrize(
    "configs",
    [
        [StateOffsetConfig(), StateOffsetConfig(target="y")],
        [StateOffsetConfig(rank=2), StateOffsetConfig(layers_to_transform=[1])],
        [InitialStateConfig(conv_state=True), InitialStateConfig(rank=3, alpha=6, dropout=0.5)],
    ],
    ids=["targets", "layers", "conv"],
)
def test_adapters_of_different_kinds(tiny_mamba, configs, make_nonzero, rows, logits):
    model = build(tiny_mamba, copy.deepcopy(configs), make_nonzero)
    actual = logits(model, rows, adapter_names=NAMES)
    torch.testing.assert_close(actual, apart(model, rows, lambda row: logits(model, row)))


def test_errors_and_no_trace_of_them(model, rows, logits, make_config):
    expected = logits(model, rows)
    with pytest.raises(ValueError, match=r"'none', which is no adapter of \w+ here.\n  Pass one of one, two for each"):
        logits(model, rows, adapter_names=["one", "none", "two", "one"])
    with pytest.raises(ValueError, match="adapter_names has 2 names for 4 rows"):
        logits(model, rows, adapter_names=["one", "two"])
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be trained with under gradient checkpointing"):
        logits(model.train(), rows, adapter_names=NAMES)
    model.gradient_checkpointing_disable()
    model.eval().add_adapter("norm", make_config(modules_to_save=["norm_f"]))
    with pytest.raises(ValueError, match="has modules_to_save"):
        logits(model, rows, adapter_names=["norm"] * 4)
    with pytest.raises(IndexError):
        logits(model, rows + 64, adapter_names=NAMES)
    assert torch.equal(logits(model, rows), expected)
    layers = [m for m in model.modules() if isinstance(m, ssmtune.mixers.StateAdapter)]
    assert all(layer.row_adapters is None for layer in layers)

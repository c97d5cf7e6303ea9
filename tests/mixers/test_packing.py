import copy
import pickle

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from ssmtune.mixers import find_mixers, patch, unpatch
from ssmtune.mixers.packing import find_sequences

KINDS = ("initial_state", "state_offset", "output_offset", "conv_state")
# Sequences shorter than the convolution among them.
LENGTHS = (5, 1, 2, 9)


@pytest.fixture(params=["mamba", "falcon_mamba", "jamba", "zamba", "mamba2"])
def family(request):
    return request.param


@pytest.fixture
def rows(tokens):
    return [tokens(1, 10 + length)[0, :length] for length in LENGTHS]


def packed(rows, *kinds):
    """The keywords that the collator of transformers makes, only those asked for."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": row} for row in rows])
    return {name: batch[name] for name in ("input_ids", *kinds)}


def alone(model, rows):
    return torch.cat([model(row[None], use_cache=False).logits for row in rows], dim=1)


def gradients(model, logits):
    model.zero_grad()
    logits.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(expected, actual, assert_close, ratio=2e-5):
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        if grad is None or actual[name] is None:
            assert grad is None or not grad.any(), name
        else:
            assert_close(name, grad, actual[name], ratio)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("position_ids",),
        ("seq_idx",),
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    ],
    ids=lambda kinds: "+".join(kinds[:2]),
)
def test_packed_sequences_are_each_alone(make_pair, adapt, rows, assert_close, family, kinds, adapted):
    theirs, ours = make_pair(family)
    if adapted:
        adapt(ours, *KINDS)
    expected = alone(ours, rows)
    actual = ours(**packed(rows, *kinds)).logits
    assert_close("logits", expected, actual, 1e-5)
    if not adapted:
        assert_close("transformers", alone(theirs, rows), actual, 1e-5)
    check(gradients(ours, expected), gradients(ours, ours(**packed(rows, *kinds)).logits), assert_close)


def test_rows_of_packed_sequences(make_pair, adapt, tokens, assert_close, family):
    _, ours = make_pair(family)
    adapt(ours, *KINDS)
    rows = [[tokens(1, 3)[0], tokens(1, 4)[0]], [tokens(1, 5)[0], tokens(1, 2)[0]]]
    batches = [packed(row, "position_ids") for row in rows]
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    expected = torch.cat([alone(ours, row) for row in rows])
    assert_close("logits", expected, ours(**batch).logits, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_whatever_runs_before_the_backward_pass(
    make_pair, rows, tokens, assert_close, family, use_reentrant
):
    _, ours = make_pair(family)
    ours.train()
    expected = gradients(ours, ours(**packed(rows, "position_ids")).logits)
    expected = {name: None if grad is None else grad.clone() for name, grad in expected.items()}
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.enable_input_require_grads()
    logits = ours(**packed(rows, "position_ids")).logits
    ours(tokens(1, 17))
    ours(**packed(rows[::-1], "position_ids"))
    check(expected, gradients(ours, logits), assert_close)


def test_survives_copies_and_goes_with_unpatch(make_pair, rows, assert_close, family):
    theirs, ours = make_pair(family)
    expected = alone(ours, rows)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        # A hook registered later must not take the number of the one that came with the pickle.
        twin.register_forward_pre_hook(lambda module, args: None)
        assert_close("logits", expected, twin(**packed(rows, "position_ids")).logits, 1e-5)
        unpatch(twin)
        assert vars(twin).keys() == vars(theirs).keys()
        assert (twin(**packed(rows, "position_ids")).logits - expected).abs().max() > 0.01
        assert not any(hook.__module__.startswith("ssmtune") for hook in twin._forward_pre_hooks.values())
        patch(twin)
        assert_close("patched again", expected, twin(**packed(rows, "position_ids")).logits, 1e-5)
    assert_close("original", expected, ours(**packed(rows, "position_ids")).logits, 1e-5)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-peft", "peft-patch"])
def test_under_lora(make_family, rows, assert_close, family, patch_first):
    peft = pytest.importorskip("peft")
    model = make_family(family)
    if patch_first:
        patch(model)
    config = peft.LoraConfig(
        r=2, target_modules=r".*(mixer|mamba)\.in_proj", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    patch(model)
    assert_close("logits", alone(model, rows), model(**packed(rows, "position_ids")).logits, 1e-5)


@pytest.mark.parametrize("patched", [True, False], ids=["patch", "tuner-alone"])
@pytest.mark.parametrize("method", ["StateOffsetConfig", "InitialStateConfig"])
def test_under_the_state_methods(make_family, rows, assert_close, family, method, patched):
    peft = pytest.importorskip("peft")
    ssmtune = pytest.importorskip("ssmtune")
    base = make_family(family)
    if patched:
        patch(base)
    before = list(vars(base))
    model = peft.get_peft_model(base, getattr(ssmtune, method)(init_weights=False, task_type="CAUSAL_LM"))
    expected = alone(model, rows)
    actual = model(**packed(rows, "position_ids")).logits
    assert_close("logits", expected, actual, 1e-5)
    check(gradients(model, expected), gradients(model, model(**packed(rows, "position_ids")).logits), assert_close)
    assert set(vars(model.unload())) - {"peft_config", "_hf_peft_config_loaded"} == set(before)


def test_the_module_of_the_convolution_may_have_hooks(make_pair, adapt, rows, assert_close, family):
    _, ours = make_pair(family)
    adapt(ours, "conv_state")
    for _, mixer in find_mixers(ours):
        mixer.conv1d.register_forward_hook(lambda *_: None)
    assert_close("logits", alone(ours, rows), ours(**packed(rows, "position_ids")).logits, 1e-5)


def test_inputs_embeds(make_pair, rows, assert_close, family):
    _, ours = make_pair(family)
    batch = packed(rows, "position_ids")
    batch["inputs_embeds"] = ours.get_input_embeddings()(batch.pop("input_ids"))
    assert_close("logits", alone(ours, rows), ours(**batch).logits, 1e-5)


def test_the_model_without_a_head(make_pair, rows, assert_close, family):
    _, ours = make_pair(family)
    inner = copy.deepcopy(ours.base_model)
    expected = torch.cat([inner(row[None]).last_hidden_state for row in rows], dim=1)
    batch = packed(rows, "position_ids")
    assert_close("keywords", expected, inner(**batch).last_hidden_state, 1e-5)
    ids, positions = batch.values()
    assert_close("positional", expected, inner(ids, position_ids=positions).last_hidden_state, 1e-5)
    assert_close("two of them", expected, inner(ids, None, position_ids=positions).last_hidden_state, 1e-5)


def test_packed_sequences_leave_no_cache(make_pair, rows, family):
    _, ours = make_pair(family)
    name = "cache_params" if hasattr(ours, "backbone") else "past_key_values"
    assert ours(**packed(rows, "position_ids"), use_cache=True).get(name) is None
    assert ours(packed(rows)["input_ids"], use_cache=True)[name] is not None


def test_positions_of_one_sequence_change_nothing(make_pair, tokens, family):
    _, ours = make_pair(family)
    positions = torch.arange(3, 9).expand(2, -1)
    with torch.no_grad():
        expected = ours(tokens(2, 6)).logits
        assert torch.equal(expected, ours(tokens(2, 6), position_ids=positions).logits)
        assert torch.equal(expected, ours(tokens(2, 6), position_ids=positions[:1]).logits)


def test_positions_of_pads_are_no_sequences(make_pair, tokens, assert_close, family):
    # As generation has them for a left-padded row.
    _, ours = make_pair(family)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        padded = ours(tokens(1, 6), attention_mask=mask, position_ids=positions).logits[:, 2:]
        assert_close("logits", ours(tokens(1, 6)[:, 2:]).logits, padded, 1e-5)


def test_refuses_boundaries_with_a_mask_or_a_cache(make_pair, rows, family):
    _, ours = make_pair(family)
    batch = packed(rows, "cu_seq_lens_q")
    with pytest.raises(ValueError, match="got cu_seq_lens_q, which packs sequences, together with attention_mask"):
        ours(**batch, attention_mask=torch.ones(1, sum(LENGTHS)))
    name = "cache_params" if hasattr(ours, "backbone") else "past_key_values"
    with pytest.raises(ValueError, match=f"together with {name}"):
        ours(**batch, **{name: DynamicCache(config=ours.config)})


def test_refuses_to_run_packed_sequences_through_a_mixer_of_transformers(make_pair, rows, family):
    theirs, ours = make_pair(family)
    name, mixer = find_mixers(ours)[0]
    mixer.__class__ = mixer.original_class
    with pytest.raises(ValueError, match=f"got packed sequences, but {name.partition('.')[2]} is not patched"):
        ours.base_model(**packed(rows, "position_ids"))


def test_a_mixer_refuses_packed_sequences_with_a_cache(make_pair, family):
    _, ours = make_pair(family)
    mixer = find_mixers(ours)[0][1]
    boundaries = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="got 2 packed sequences together with a cache"):
        mixer(torch.randn(1, 5, 32), cache_params=DynamicCache(config=ours.config), attention_mask=boundaries)


def test_compile_fullgraph(make_pair, adapt, rows, assert_close, family):
    torch._dynamo.reset()
    _, ours = make_pair(family)
    adapt(ours, *KINDS)
    mixer = find_mixers(ours)[0][1]
    boundaries = packed(rows, "cu_seq_lens_q")["cu_seq_lens_q"]
    hidden = torch.randn(1, sum(LENGTHS), 32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    expected, actual = mixer(hidden, attention_mask=boundaries), compiled(hidden, attention_mask=boundaries)
    assert_close("out", expected, actual, 1e-5)
    check(gradients(mixer, expected), gradients(mixer, actual), assert_close)


def test_compile_the_model(make_pair, rows, assert_close, family):
    torch._dynamo.reset()
    _, ours = make_pair(family)
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        for kind in ("cu_seq_lens_q", "position_ids"):
            batch = packed(rows, kind)
            assert_close(kind, ours(**batch).logits, compiled(**batch).logits, 1e-5)


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, None),
        ({"position_ids": torch.tensor([[4, 5, 6], [0, 1, 2]])}, None),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, [0, 2, 3, 5, 6]),
        ({"position_ids": torch.tensor([[0, 1, 2], [0, 0, 0]])}, [0, 3, 4, 5, 6]),
        ({"seq_idx": torch.tensor([[0, 0, 1], [0, 0, 0]])}, [0, 2, 3, 6]),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, [0, 6]),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6]), "position_ids": torch.tensor([[0, 1, 0]])}, [0, 2, 6]),
        ({"position_ids": torch.zeros(3, 2, 3)}, None),
    ],
)
def test_find_sequences(kwargs, expected):
    found = find_sequences(kwargs, batch=2, seqlen=3)
    assert (None if found is None else found.tolist()) == expected


def test_trainer_with_the_collator_of_transformers(make_pair, rows, tmp_path, family):
    _, ours = make_pair(family)
    row_loss = sum(ours(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows if len(row) > 1)
    expected = row_loss.item() / sum(len(row) - 1 for row in rows)
    data = [{"input_ids": row.tolist()} for row in rows]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(ours, arguments, train_dataset=data, data_collator=DataCollatorWithFlattening())
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected, rel=1e-4)

"""Every method on every family. The names of the tests and their docstrings are the rows of docs/models.md."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ssmtune
from ssmtune.mixers import find_mixers, patch
from ssmtune.prompt_tuning import VirtualTokenModel, cache_name
from ssmtune.stored_adapters import load_adapter

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def loss_and_gradients(model: nn.Module, input_ids):
    model.zero_grad()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def generate(model: nn.Module, input_ids, **options):
    """The new tokens (batch, steps) and the logits (batch, steps, vocab) they were chosen by."""
    out = model.generate(input_ids=input_ids, return_dict_in_generate=True, output_logits=True, **GREEDY | options)
    return out.sequences[:, input_ids.shape[1] :], torch.stack(out.logits, dim=1)


def test_creates(method, patched, fits):
    """The method applies, and trains tensors in every mixer and nowhere else (without mixers: in every layer)."""
    model = method.apply(copy.deepcopy(patched))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if method.kind == "full":
        assert trainable == [name for name, _ in patched.named_parameters()]
    elif trainable == ["prompt_encoder.default.embedding.weight"]:
        assert method.kind == "prompt"
    elif not find_mixers(patched):
        layers = {name.split(".layers.")[1].split(".")[0] for name in trainable if ".layers." in name}
        assert sorted(layers) == [str(layer) for layer in range(patched.config.num_hidden_layers)]
    else:
        mixers = [f"base_model.model.{name}." for name, _ in find_mixers(patched)]
        assert [[name.startswith(mixer) for mixer in mixers].count(True) for name in trainable] == [1] * len(trainable)
        assert all(any(name.startswith(mixer) for name in trainable) for mixer in mixers)


def test_starts_as_the_base(method, base, fresh, input_ids, logits, assert_close):
    """Before the first step the logits are those of the unpatched model of transformers."""
    if method.kind == "prompt":
        pytest.skip("a prompt starts from the embeddings of random tokens")
    assert_close("logits", logits(base, input_ids), logits(fresh, input_ids), 1e-5)


def test_trains_every_tensor(fresh, input_ids):
    """`ssmtune.check_gradients` finds a gradient for every trainable tensor."""
    report = ssmtune.check_gradients(fresh, {"input_ids": input_ids, "labels": input_ids})
    assert report.ok, str(report)


def test_learns(fresh, input_ids):
    """Every one of five steps of AdamW lowers the loss."""
    model = copy.deepcopy(fresh).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        losses.append(loss_and_gradients(model, input_ids)[0].item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-4, losses


def test_generates_with_a_cache(trained, input_ids, assert_close):
    """Greedy generation token by token from the cached state is that without a cache, logits included."""
    expected_tokens, expected = generate(trained, input_ids, use_cache=False)
    tokens, actual = generate(trained, input_ids)
    assert_close("logits", expected, actual, 1e-5)
    assert torch.equal(tokens, expected_tokens)


def test_ignores_pads_on_the_left(trained, input_ids, logits, assert_close):
    """Pads before a text change neither its logits nor what is generated after it."""
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    alone, short = input_ids[:1], input_ids[1:, 4:]
    padded = logits(trained, input_ids * mask, attention_mask=mask)
    assert_close("whole", logits(trained, alone), padded[:1], 1e-5)
    assert_close("padded", logits(trained, short), padded[1:, 4:], 1e-5)
    _, generated = generate(trained, input_ids * mask, attention_mask=mask)
    assert_close("generated after whole", generate(trained, alone)[1], generated[:1], 1e-5)
    assert_close("generated after padded", generate(trained, short)[1], generated[1:], 1e-5)


def test_ignores_pads_on_the_right(base, trained, input_ids, assert_close):
    """Pads after a text, as in a training batch, change neither its logits nor the states that its mixers leave."""
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0

    def run(input_ids, **inputs):
        with torch.no_grad():
            output = trained(input_ids=input_ids, use_cache=True, **inputs)
        cache = output[cache_name(base)]
        states = [cache.layers[mixer.layer_idx].recurrent_states[0] for _, mixer in find_mixers(base)]
        return output.logits[:, -input_ids.shape[1] :], torch.stack(states, dim=1) if states else None

    logits, states = run(input_ids * mask, attention_mask=mask)
    for row, length in enumerate((9, 5)):
        expected_logits, expected_states = run(input_ids[row : row + 1, :length])
        assert_close(f"logits {row}", expected_logits, logits[row : row + 1, :length], 1e-5)
        if states is not None:
            assert_close(f"states {row}", expected_states, states[row : row + 1], 1e-5)


def test_continues_in_chunks(base, trained, input_ids, logits, assert_close):
    """Texts of two lengths handed over in pieces of several tokens, with the cache, give what they give at once."""
    mask = torch.ones_like(input_ids)
    mask[1, :2] = 0
    cache, pieces, seen = {}, [], 0
    with torch.no_grad():
        for piece in (input_ids * mask).split([4, 1, 4], dim=1):
            seen += piece.shape[1]
            output = trained(input_ids=piece, attention_mask=mask[:, :seen], use_cache=True, **cache)
            cache = {cache_name(base): output[cache_name(base)]}
            pieces.append(output.logits[:, -piece.shape[1] :])
    actual = torch.cat(pieces, dim=1)
    assert_close("whole", logits(trained, input_ids[:1]), actual[:1], 1e-5)
    assert_close("padded", logits(trained, input_ids[1:, 2:]), actual[1:, 2:], 1e-5)


def test_keeps_packed_sequences_apart(trained, input_ids, logits, assert_close):
    """Texts one after the other in a row, their positions starting again, give what each gives alone."""
    if isinstance(trained, VirtualTokenModel):
        pytest.skip("virtual tokens of peft go in front of one text")
    first, second, third = (input_ids[:1, columns] for columns in (slice(4), slice(4, 5), slice(5, 9)))
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])
    packed = logits(trained, input_ids[:1], position_ids=positions, use_cache=False)
    assert_close("logits", torch.cat([logits(trained, text) for text in (first, second, third)], dim=1), packed, 1e-5)


def test_can_be_disabled(method, patched, trained, input_ids, logits, assert_close, error_ratio):
    """Under `disable_adapter` the logits are those of the base, to the bit (LoRA on dt_proj: to rounding)."""
    if method.kind == "full":
        pytest.skip("full fine-tuning has no adapter to disable")
    adapted = logits(trained, input_ids)
    expected = logits(patched, input_ids)
    # else the other checks, which are held to 1e-5, would show nothing
    assert error_ratio(expected, adapted) > 1e-3
    # A wrapped dt_proj adds its bias itself, with another rounding than the scan.
    ratio = 1e-6 if method.target == "dt_proj" else 0
    with trained.disable_adapter():
        assert_close("disabled", expected, logits(trained, input_ids), ratio)
    assert torch.equal(logits(trained, input_ids), adapted)


def test_saves_and_loads(method, base, trained, input_ids, logits, assert_close, tmp_path):
    """Saved and loaded again it has the same tensors, to the bit, and logits; only safetensors are stored."""
    trained.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    if method.kind == "full":
        loaded = type(base).from_pretrained(tmp_path)
    else:
        loaded = copy.deepcopy(base)
    if find_mixers(loaded):
        patch(loaded)
    if method.kind != "full":
        loaded = load_adapter(loaded, tmp_path)
    tensors = dict(loaded.named_parameters())
    # what the virtual tokens of a mixer leave behind is stored in their place
    if method.name != "prefix" or not find_mixers(base):
        assert tensors.keys() == dict(trained.named_parameters()).keys()
        assert [name for name, tensor in trained.named_parameters() if not torch.equal(tensor, tensors[name])] == []
    # Not to the bit: how a matrix product is summed depends on where its factors lie in memory.
    assert_close("logits", logits(trained, input_ids), logits(loaded, input_ids), 1e-5)


def test_checkpoints_activations(trained, input_ids, assert_close):
    """Gradient checkpointing gives the same loss, to the bit, and the same gradients."""
    model = copy.deepcopy(trained).train()
    expected_loss, expected = loss_and_gradients(model, input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, actual = loss_and_gradients(model, input_ids)
    assert torch.equal(loss, expected_loss)
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        # Not to the bit: peft makes the embeddings need gradients, so that an offset's own comes from the whole scan.
        assert_close(name, grad, actual[name], 1e-6)


def test_runs_in_bfloat16(bfloat16_error, trained, input_ids, logits, error_ratio):
    """In bfloat16 the logits err at most twice as far as those of the base in transformers; gradients are finite."""
    model = copy.deepcopy(trained).to(torch.bfloat16)
    expected = logits(copy.deepcopy(model).float(), input_ids)
    error = error_ratio(expected, logits(model, input_ids))
    print(f"error ratio {error:.2e}, of the base in transformers {bfloat16_error:.2e}")
    assert error <= 2 * bfloat16_error
    _, gradients = loss_and_gradients(model, input_ids)
    assert all(grad.isfinite().all() for grad in gradients.values())


def test_merges_or_refuses_to(method, trained, input_ids, logits, assert_close):
    """A change of weights merges into them with the same logits; a state method raises an error, and stays as it is."""
    if method.kind in ("full", "prompt"):
        pytest.skip("full fine-tuning and a prompt add nothing to merge into weights")
    model = copy.deepcopy(trained)
    expected = logits(model, input_ids)
    if method.kind == "weights":
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert_close("logits", expected, logits(merged, input_ids), 1e-5)
    else:
        with pytest.raises(NotImplementedError, match="cannot merge its adapter"):
            model.merge_and_unload()
        assert torch.equal(logits(model, input_ids), expected)


def test_hands_over_a_starting_cache(method, base, patched, trained, input_ids, logits, assert_close):
    """The base with `ssmtune.starting_cache` gives the logits, and generates the tokens, of the adapted model."""
    if not method.name.startswith("initial state"):
        pytest.skip("only an initial state can be put into a cache")
    name = cache_name(base)
    actual = logits(patched, input_ids, **{name: ssmtune.starting_cache(trained, 2)}, use_cache=True)
    assert_close("logits", logits(trained, input_ids), actual, 1e-5)
    tokens, _ = generate(patched, input_ids, **{name: ssmtune.starting_cache(trained, 2)})
    assert torch.equal(tokens, generate(trained, input_ids)[0])


def test_can_be_copied(trained, input_ids, logits):
    """`copy.deepcopy` and `pickle` give models with the same logits, to the bit."""
    expected = logits(trained, input_ids)
    assert torch.equal(logits(copy.deepcopy(trained), input_ids), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(trained)), input_ids), expected)

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import ssmtune
from ssmtune.data import IGNORED
from ssmtune.likelihood import next_token_losses, target_losses
from ssmtune.long_inputs import chunked_losses
from ssmtune.mixers import patch
from ssmtune.mixers.continuation import cache_of, states_of
from ssmtune.prompt_tuning import add_prompt

KINDS = ("initial_state", "state_offset", "output_offset", "conv_state")
SEQLEN = 13


@pytest.fixture
def batch(tokens):
    """Two rows, the second shorter, with labels from the seventh token on."""
    input_ids, mask = tokens(2, SEQLEN), torch.ones(2, SEQLEN, dtype=torch.long)
    mask[1, 9:] = 0
    labels = input_ids.masked_fill(mask == 0, IGNORED)
    labels[:, :6] = IGNORED
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check(expected, actual, assert_close, ratio=1e-5):
    assert expected.keys() == actual.keys() and expected
    for name, gradient in expected.items():
        assert_close(name, gradient, actual[name], ratio)


def whole(model, batch):
    loss = target_losses(model, batch).sum() / (batch["labels"] != IGNORED).sum()
    model.zero_grad()
    loss.backward()
    return loss, gradients(model)


def in_chunks(model, batch, chunk_length, **options):
    model.zero_grad()
    loss = ssmtune.chunked_backward(model, batch, chunk_length, **options)
    return loss, gradients(model)


def in_one_graph(model, batch, chunk_length, between=lambda state: state):
    """The oracle of what a chunk is: all of them forward, then one backward pass."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    states, losses = None, []
    for start in range(0, SEQLEN, chunk_length):
        columns = slice(start, start + chunk_length)
        cache = cache_of(model.config, states)
        inputs = {name: batch[name][:, columns] for name in ("input_ids", "attention_mask")}
        losses.append(next_token_losses(model, targets[:, columns], **inputs, cache_params=cache, use_cache=True).sum())
        states = [between(state) for state in states_of(cache)]
    model.zero_grad()
    (sum(losses) / (targets != IGNORED).sum()).backward()
    return gradients(model)


@pytest.mark.parametrize("chunk_length", [1, 2, 5, SEQLEN, 20])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_chunked_backward_is_that_of_the_whole(make_pair, adapt, batch, assert_close, family, chunk_length):
    _, ours = make_pair(family)
    adapt(ours, *KINDS)
    expected, gradient = whole(ours, batch)
    loss, actual = in_chunks(ours.train(), batch, chunk_length)
    assert_close("loss", expected, loss, 1e-5)
    check(gradient, actual, assert_close)


def test_chunked_backward_in_float64(make_pair, adapt, batch, assert_close):
    _, ours = make_pair()
    ours.double()
    adapt(ours, *KINDS)
    with ssmtune.backend("reference"):
        # The norms of transformers are in float32, whatever the model.
        check(whole(ours, batch)[1], in_chunks(ours, batch, 4)[1], assert_close, 1e-6)


@pytest.mark.parametrize("chunk_length", [1, 4])
def test_truncated_gradients_stop_at_the_borders(make_pair, adapt, batch, assert_close, chunk_length):
    _, ours = make_pair()
    adapt(ours, *KINDS)
    loss, actual = in_chunks(ours, batch, chunk_length, gradients="truncated")
    assert_close("loss", whole(ours, batch)[0], loss, 1e-5)
    check(in_one_graph(ours, batch, chunk_length, torch.Tensor.detach), actual, assert_close)
    exact = in_chunks(ours, batch, chunk_length)[1]
    assert "backbone.layers.0.mixer.additions.tensors.initial_state" in exact.keys() - actual.keys()


def test_gradients_are_added_and_divided_as_told(make_pair, batch, assert_close):
    _, ours = make_pair()
    _, once = in_chunks(ours, batch, 5)
    ssmtune.chunked_backward(ours, batch, 5, divisor=(batch["labels"] != IGNORED).sum() / 2)
    check({name: 3 * gradient for name, gradient in once.items()}, gradients(ours), assert_close)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "last"])
def test_dropout_is_drawn_once(make_pair, batch, assert_close, layers):
    peft = pytest.importorskip("peft")
    _, ours = make_pair()
    config = peft.LoraConfig(
        r=4, lora_dropout=0.5, target_modules=["in_proj", "x_proj"], init_lora_weights=False, layers_to_transform=layers
    )
    model = peft.get_peft_model(ours, config).train()
    torch.manual_seed(1)
    expected = in_one_graph(model, batch, 4)
    after = torch.rand(1)
    torch.manual_seed(1)
    check(expected, in_chunks(model, batch, 4)[1], assert_close)
    assert torch.equal(after, torch.rand(1))


def test_autocast_covers_every_chunk(make_pair, batch, assert_close):
    _, ours = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        loss, actual = in_chunks(ours, batch, 5)
        expected = in_one_graph(ours, batch, 5)
    check(expected, actual, assert_close, 1e-2)


def test_chunked_losses(make_pair, adapt, batch, assert_close):
    _, ours = make_pair()
    adapt(ours, *KINDS)
    with torch.no_grad():
        expected = target_losses(ours, batch).sum(1)
    assert_close("losses", expected, chunked_losses(ours, batch, 4), 1e-5)


def test_keeps_the_activations_of_one_chunk_at_a_time(make_pair, tokens):
    _, ours = make_pair()

    def most_kept(seqlen):
        """Most bytes that autograd holds at once, parameters left out."""
        held, most = 0, 0
        parameters = {p.data_ptr() for p in ours.parameters()}

        class Saved:
            def __init__(self, tensor):
                nonlocal held, most
                self.tensor = tensor
                self.bytes = 0 if tensor.data_ptr() in parameters else tensor.nbytes
                held += self.bytes
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.bytes

        input_ids = tokens(1, seqlen)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            ssmtune.chunked_backward(ours, batch, 16)
        return most

    assert 0 < most_kept(128) <= 1.01 * most_kept(64)


def test_refuses_what_would_be_wrong(make_pair, make_family, batch):
    for model in (patched(make_family("jamba")), patched(make_family("falcon_h1")), llama()):
        with pytest.raises(ValueError, match="cannot be run in chunks: it has attention layers"):
            ssmtune.chunked_backward(model, batch, 4)
    with pytest.raises(ValueError, match="got a text in chunks, but .* is not patched"):
        ssmtune.chunked_backward(make_family("mamba"), batch, 4)
    _, ours = make_pair()
    with pytest.raises(ValueError, match="chunk_length is 0"):
        ssmtune.chunked_backward(ours, batch, 0)
    with pytest.raises(ValueError, match="gradients is 'none', expected 'exact' or 'truncated'"):
        ssmtune.chunked_backward(ours, batch, 4, gradients="none")
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        ssmtune.chunked_backward(ours, batch, 4)
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be trained in chunks"):
        ssmtune.chunked_backward(add_prompt(make_pair()[1], 2), batch, 4)


def patched(model):
    patch(model)
    return model


def llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))

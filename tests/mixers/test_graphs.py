"""A patched model compiled as one graph, and decoding replayed from a CUDA graph; on the CPU as far as that goes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssmtune.mixers import patch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

PROMPT, NEW_TOKENS = 6, 4


@pytest.fixture
def model(make_mamba, adapt):
    made = make_mamba(num_hidden_layers=2)
    patch(made)
    adapt(made, "initial_state", "state_offset", "output_offset")
    return made.to(DEVICE)


def test_training_compiles_without_a_graph_break(model, tokens, assert_close):
    torch.compiler.reset()
    given = tokens(2, PROMPT).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(given, labels=given, use_cache=False)
        output.loss.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        results.append({"logits": output.logits.detach(), **gradients})
    for name, eager in results[0].items():
        assert_close(name, eager, results[1][name], 1e-4)


@torch.no_grad()
def test_a_decoding_step_compiles_without_a_graph_break(model, tokens, assert_close):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    caches = [model(tokens(2, PROMPT).to(DEVICE), use_cache=True).cache_params for _ in range(2)]
    for token in tokens(2, NEW_TOKENS).to(DEVICE).split(1, dim=1):
        expected, actual = (
            run(token, cache_params=cache, use_cache=True).logits
            for run, cache in zip((model, compiled), caches, strict=True)
        )
        assert_close("logits", expected, actual, 1e-4)


def states(cache) -> list[Tensor]:
    kinds = (kind for layer in cache.layers for kind in (layer.conv_states, layer.recurrent_states))
    return [state for kind in kinds for state in kind.values()]


def record(step: Callable[[], Tensor], cache) -> Callable[[], Tensor]:
    """Capture a step in a CUDA graph and leave the cache as it was; on the CPU the replay is the step itself."""
    if DEVICE == "cpu":
        return step
    before = [state.clone() for state in states(cache)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for state, value in zip(states(cache), before, strict=True):
        state.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def test_replayed_decoding_equals_eager(model, tokens, assert_close):
    prompt = tokens(2, PROMPT).to(DEVICE)
    eager, recorded = (model(prompt, use_cache=True).cache_params for _ in range(2))
    token = prompt[:, :1].clone()
    replay = record(lambda: model(token, cache_params=recorded, use_cache=True).logits, recorded)
    places = [state.data_ptr() for state in states(recorded)]
    assert len(places) == 4
    for new in tokens(2, NEW_TOKENS).to(DEVICE).split(1, dim=1):
        token.copy_(new)
        expected = model(new, cache_params=eager, use_cache=True).logits
        assert_close("logits", expected, replay(), 1e-6)
        # a graph reads and writes where it did when it was captured
        assert [state.data_ptr() for state in states(recorded)] == places
    for expected, actual in zip(states(eager), states(recorded), strict=True):
        assert_close("state", expected, actual, 1e-6)

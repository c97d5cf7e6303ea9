"""Fixtures of all tests. Without a GPU, Triton kernels run in its interpreter."""

import os
from pathlib import Path

# before anything imports triton, which reads it once
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import importlib.util
import random
import sys

import pytest
import torch


def _load(name: str):
    # the tests are no package: what they share is loaded from its file
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


numerics = _load("numerics")
_load("emulation")
_load("emulated_cuda")
_load("ssd_inputs")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_finish() -> None:
    """Leave out of garbage collection what stays: Trainer and every run of a sweep ask for a whole one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Give it back: the interpreter takes down at its end what it has, and extensions complain of what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(name, expected, actual, ratio)` of tests/numerics.py."""
    return numerics.assert_close


@pytest.fixture(scope="session")
def error_ratio():
    """`error_ratio(expected, actual)` of tests/numerics.py."""
    return numerics.error_ratio


@pytest.fixture
def tiny_mamba():
    """A random Mamba: 2 layers, hidden size 32, state size 8, vocabulary 64, float32, in evaluation mode."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=64,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return MambaForCausalLM(config).eval()


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill what `torch.empty` and its relatives allocate with NaN, so that a kernel that leaves a hole is found out."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> str:
    """Directory of a random Mamba with a byte-level tokenizer that takes any text; not to be written to."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_mamba")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the sea is blue and the sun is red"] * 4, vocab_size=280, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(directory)
    end = tokenizer.eos_token_id
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MambaForCausalLM(config).save_pretrained(directory)
    return str(directory)

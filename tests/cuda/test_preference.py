"""What `auto` does where the CUDA kernels were built: it takes them, and says so once."""

import logging

import pytest
import torch

from ssmtune import native
from ssmtune.ops import backends


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "cuda_why_not", lambda: None)
    monkeypatch.setattr(backends, "_logged", set())


@pytest.mark.parametrize("op", backends.OPERATORS)
def test_auto_prefers_the_cuda_kernels(built, caplog, op):
    with caplog.at_level(logging.INFO, logger="ssmtune"):
        chosen = [backends.choose(op, torch.device("cuda"), torch.bfloat16, "auto") for _ in range(3)]
    assert chosen == ["cuda"] * 3
    assert [record.message for record in caplog.records] == [f"{op} on cuda runs on backend cuda"]


def test_auto_leaves_what_they_do_not_take(built):
    assert backends.choose("selective_scan", torch.device("cuda"), torch.float64, "auto") == "reference"
    assert backends.choose("selective_scan", torch.device("cpu"), torch.bfloat16, "auto") != "cuda"


def test_too_little_shared_memory_is_said(monkeypatch, tmp_path):
    reason = "a block has at most 99 KiB of shared memory there, and the backward scan takes up to 128"
    operators = type("Operators", (), {"cuda_why_not": staticmethod(lambda: reason)})
    library = tmp_path / "_C_cuda.so"
    library.touch()
    monkeypatch.setattr(native, "CUDA_LIBRARY", library)
    monkeypatch.setattr(native, "_open", lambda *args: None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: "sm_80 and PTX")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.ops, "ssmtune_native", operators)
    assert native._load_cuda() == (
        f"{library}, built for sm_80 and PTX, does not run on sm_89: {reason}\n  The Triton kernels run there."
    )

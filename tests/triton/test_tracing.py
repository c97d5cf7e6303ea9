"""Calls on the backend triton are traced without running a kernel, and few kernels serve all lengths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmtune.ops import causal_conv1d, selective_scan, selective_state_update

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"u": (2, 64, 8192), "delta": (2, 64, 8192), "A": (64, 16), "B": (2, 16, 8192), "C": (2, 16, 8192)}
COUNT_KERNELS = """
from benchmarks import kernel_cases
from benchmarks.triton_launches import recorded

with recorded("sm_90") as launches:
    for kernel_cases.SEQLEN in (1000, 1024, 2047):
        kernel_cases.scan(kernel_cases.torch.bfloat16, 16)
print(len(launches), len({launch.compiled.hash for launch in launches}))
"""


@pytest.fixture
def no_kernel(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")

    def refuse(*args):
        raise AssertionError("a kernel ran")

    names = ("selective_scan_forward", "selective_scan_backward", "causal_conv1d_forward", "selective_state_update")
    for name in names:
        monkeypatch.setattr(f"ssmtune.ops.triton.{name}", refuse)
    torch.compiler.reset()


def test_compile_of_fake_tensors(no_kernel):
    def step(inputs, state):
        x = causal_conv1d(inputs["u"], inputs["A"][:, :4], activation="silu", backend="triton")
        out, last_state = selective_scan(**inputs | {"u": x}, return_last_state=True, backend="triton")
        with torch.no_grad():
            rows = (inputs[name][..., 0] for name in ("u", "delta", "B", "C"))
            x, dt, B, C = (row.detach() for row in rows)
            selective_state_update(state, x, dt, inputs["A"].detach(), B, C, backend="triton")
        return out.sum() + last_state.sum()

    with FakeTensorMode():
        inputs = {name: torch.empty(shape, requires_grad=True) for name, shape in SHAPES.items()}
        loss = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs, torch.empty(2, 64, 16))
        gradients = torch.autograd.grad(loss, [inputs["delta"], inputs["B"]])
    assert [gradient.shape for gradient in gradients] == [SHAPES["delta"], SHAPES["B"]]


def test_lengths_share_their_kernels(tmp_path):
    # nothing is tuned at run time: forward and backward are compiled once for a model
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "SSMTUNE_LAZY": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", COUNT_KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["6", "2"]

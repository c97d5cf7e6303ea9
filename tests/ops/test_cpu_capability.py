"""The compiled kernels of each instruction set compute the same."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import error_ratio

# A little of everything, run in a process of its own: the instruction set is chosen when the library is loaded.
PROGRAM = """
import sys
import torch
from ssmtune import native
from ssmtune.ops import causal_conv1d, selective_scan, selective_state_update

torch.set_num_threads(1)
results = {"capability": native.cpu_capability()}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for layout in ("first", "last"):
        for dim, seqlen, dstate in ((37, 70, 16), (16, 65, 5)):
            torch.manual_seed(dim)
            def sequence(size):
                x = torch.randn(2, seqlen, size).transpose(1, 2)
                return (x if layout == "last" else x.contiguous()).to(dtype).requires_grad_()
            def parameter(*shape):
                return torch.randn(*shape).requires_grad_()
            A = (-torch.rand(dim, dstate)).requires_grad_()
            inputs = [sequence(dim), sequence(dim), A, sequence(dstate), sequence(dstate), parameter(dim)]
            inputs += [sequence(dim), parameter(dim)]
            extra = dict(initial_state=parameter(dim, dstate), state_offset=parameter(2, dim, dstate))
            extra["output_offset"] = parameter(dim)
            out, last_state = selective_scan(*inputs, True, True, **extra, backend=sys.argv[2])
            weight = parameter(dim, 4)
            convolved = causal_conv1d(inputs[0], weight, activation="silu", backend=sys.argv[2])
            inputs += [*extra.values(), weight]
            packed = dict(cu_seqlens=torch.tensor([0, 2, seqlen]), return_final_states=True, activation="silu")
            packed = causal_conv1d(inputs[0][:1], weight, **packed, backend=sys.argv[2])
            results_of_all = [out, last_state, convolved, *packed]
            weights = [torch.randn(*x.shape).to(dtype).to(x.dtype) for x in results_of_all]
            gradients = torch.autograd.grad(results_of_all, inputs, weights)
            state = last_state.detach()
            with torch.no_grad():
                step = [x[..., -1] if x.dim() == 3 else x for x in inputs[:8]]
                updated = selective_state_update(state, *step, True, backend=sys.argv[2])
            key = f"{dtype}-{layout}-{dim}"
            results[key] = [x.detach() for x in (*results_of_all, *gradients, state, updated)]
torch.save(results, sys.argv[1])
"""


def run(path, backend, capability=None):
    # the operators alone load faster
    environment = os.environ | {"SSMTUNE_LAZY": "1"}
    environment.pop("SSMTUNE_CPU_CAPABILITY", None)
    if capability:
        environment["SSMTUNE_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", PROGRAM, str(path), backend]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("capability") / "reference.pt"
    assert run(path, "reference").returncode == 0
    return torch.load(path)


@pytest.mark.parametrize("capability", ["avx512_bf16", "avx512", "avx2", "default"])
def test_each_instruction_set(native_kernels, tmp_path, expected, capability):
    done = run(tmp_path / "results.pt", "cpu", capability)
    if done.returncode != 0 and "not supported" in done.stderr:
        pytest.skip(f"this machine has no {capability}")
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.pop("capability") == capability
    for case, values in results.items():
        for i, (a, b) in enumerate(zip(expected[case], values, strict=True)):
            # both round to the dtype, perhaps to different neighbours
            ratio = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[b.dtype]
            assert error_ratio(a, b) <= ratio, f"{case}: result {i}"


def test_unknown_instruction_set(native_kernels, tmp_path):
    done = run(tmp_path / "results.pt", "cpu", "avx1024")
    assert done.returncode != 0
    assert "avx1024" in done.stderr and "default" in done.stderr

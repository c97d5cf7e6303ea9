"""Which backend runs, what is said about it, and what happens to one that cannot."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import ssmtune
from ssmtune import native
from ssmtune.ops import backends, causal_conv1d

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("SSMTUNE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_logged", set())


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_reason", "not built: ssmtune/_C.so is missing\n  Install a C++ compiler.")


def choose(op="selective_scan", dtype=torch.float32, wish=None, device=DEVICE):
    return backends.choose(op, device, dtype, wish)


def test_available_backends():
    for op in backends.OPERATORS:
        listed = ssmtune.available_backends(op)
        assert list(listed) == ["cuda", "triton", "cpu", "reference"]
        assert listed["reference"] is None
        if not torch.cuda.is_available():
            assert listed["cuda"] == f"no GPU found (torch {torch.__version__})"
        assert listed["cpu"] == native.why_not()


def test_available_backends_of_an_unknown_operator():
    with pytest.raises(ValueError, match="no operator 'selective_scam'; did you mean 'selective_scan'?"):
        ssmtune.available_backends("selective_scam")


@pytest.mark.parametrize("op", backends.OPERATORS)
def test_auto_takes_the_compiled_kernels(native_kernels, op):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose(op, dtype) == "cpu"
    assert choose(op, torch.float64) == "reference"
    assert choose(op, device=torch.device("meta")) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton kernels without being asked")
def test_auto_never_takes_the_interpreter():
    assert choose("selective_state_update") in ("cpu", "reference")


def test_auto_without_compiled_kernels(without_native):
    assert choose() == "reference"


def test_wishes(monkeypatch):
    monkeypatch.setenv("SSMTUNE_BACKEND", "reference")
    assert choose() == "reference"
    assert choose(wish="auto") == choose(wish="auto", dtype=torch.float32)
    with ssmtune.backend("auto"):
        assert choose(dtype=torch.float64) == "reference"
    monkeypatch.delenv("SSMTUNE_BACKEND")
    before = choose()
    with ssmtune.backend("reference"):
        assert choose() == "reference"
        with ssmtune.backend("auto"):
            assert choose() == before
        assert choose() == "reference"
    assert choose() == before


def test_context_is_left_after_an_error():
    before = choose()
    with pytest.raises(KeyError), ssmtune.backend("reference"):
        raise KeyError
    assert choose() == before


def test_argument_beats_context_beats_environment(native_kernels, monkeypatch):
    monkeypatch.setenv("SSMTUNE_BACKEND", "reference")
    assert choose() == "reference"
    with ssmtune.backend("cpu"):
        assert choose() == "cpu"
        assert choose(wish="reference") == "reference"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="there is no backend 'tritn'; did you mean 'triton'?"):
        with ssmtune.backend("tritn"):
            pass
    monkeypatch.setenv("SSMTUNE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SSMTUNE_BACKEND: there is no backend 'gpu'"):
        choose()


def test_a_wish_never_falls_back(without_native):
    for wished in (lambda: choose(wish="cpu"), lambda: choose_within("cpu")):
        with pytest.raises(RuntimeError) as error:
            wished()
        assert str(error.value) == (
            "selective_scan: backend 'cpu' was requested but cannot run: not built: ssmtune/_C.so is missing\n"
            "  Install a C++ compiler."
        )


def choose_within(name):
    with ssmtune.backend(name):
        return choose()


def test_a_wish_that_does_not_fit_the_call(native_kernels):
    with pytest.raises(RuntimeError, match="the CPU kernels take float32, bfloat16 and float16, got float64"):
        choose(wish="cpu", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the CPU kernels take tensors on cpu, got tensors on cuda"):
        choose(wish="cpu", device=torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"'triton' was requested but cannot run: no GPU found \(torch ") as error:
        choose("selective_state_update", wish="triton")
    assert "TRITON_INTERPRET=1" in str(error.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("selective_state_update", wish="triton") == "triton"


def test_choice_is_logged_once(native_kernels, caplog):
    caplog.set_level(logging.INFO, logger="ssmtune")
    for _ in range(3):
        causal_conv1d(torch.randn(1, 2, 3), torch.randn(2, 4))
    assert [record.getMessage() for record in caplog.records] == ["causal_conv1d on cpu runs on backend cpu"]
    choose()
    assert caplog.messages[1:] == ["selective_scan on cpu runs on backend cpu"]


def test_slow_path_is_warned_of_once(without_native, caplog):
    for _ in range(3):
        choose()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "selective_scan on cpu runs on the reference, which is correct but much slower.\n"
        "  The CPU kernels are not built: ssmtune/_C.so is missing"
    )


def test_reference_on_request_is_no_warning(without_native, caplog):
    with ssmtune.backend("reference"):
        choose()
    choose(dtype=torch.float64)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_everything_runs_without_compiled_kernels():
    program = (
        "import torch, ssmtune\n"
        "x = torch.randn(1, 4, 5, requires_grad=True)\n"
        "out = ssmtune.selective_scan(x, x, -torch.ones(4, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5))\n"
        "ssmtune.causal_conv1d(out, torch.ones(4, 3)).sum().backward()\n"
        "print(ssmtune.available_backends('selective_scan')['cpu'])"
    )
    environment = os.environ | {"SSMTUNE_NO_NATIVE": "1", "SSMTUNE_LAZY": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("switched off by SSMTUNE_NO_NATIVE")
    assert "correct but much slower" in done.stderr


@pytest.mark.gpu
def test_tensors_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 16, 5, device="cuda", generator=generator, requires_grad=True)
    A, B = -torch.ones(16, 4, device="cuda"), torch.randn(2, 4, 5, device="cuda", generator=generator)
    assert choose(device=torch.device("cuda")) == "reference"
    assert choose("selective_state_update", device=torch.device("cuda")) == "triton"
    out = ssmtune.selective_scan(x, x, A, B, B, delta_softplus=True)
    out.sum().backward()
    assert x.grad.isfinite().all()
    state = torch.zeros(2, 16, 4, device="cuda")
    with torch.no_grad():
        steps = [
            ssmtune.selective_state_update(state, x[:, :, t], x[:, :, t], A, B[:, :, t], B[:, :, t], dt_softplus=True)
            for t in range(5)
        ]
    torch.testing.assert_close(torch.stack(steps, dim=2), out, rtol=1e-5, atol=1e-5)

"""What `ssmtune bench` and the benchmark of a GPU measure; as planned where there is a GPU, too."""

import pytest

from benchmarks import decoding, gpu_kernels
from ssmtune.measure import plans
from ssmtune.measure.peers import PEERS, mamba_ssm_scan
from ssmtune.measure.specs import OURS


@pytest.fixture(params=["with mamba_ssm", "without"])
def gpu(request, monkeypatch):
    """What is planned for a GPU with both kinds of kernels."""
    there = request.param == "with mamba_ssm"
    kernels = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}
    for module in (plans, gpu_kernels):
        monkeypatch.setattr(module, "available", lambda op, device: kernels[device])
    monkeypatch.setattr(mamba_ssm_scan, "why_not", lambda: None if there else "not installed")
    names = ("transformers", "mamba_ssm") if there else ("transformers",)
    monkeypatch.setattr(plans, "usable", lambda device: ({name: PEERS[name] for name in names}, {}))
    return there


@pytest.mark.parametrize("preset", plans.PRESETS)
def test_plan_of_a_gpu_compares_like_with_like(gpu, preset):
    groups = plans.plan("cuda", preset)
    assert {spec.op for group in groups for spec in group} == {
        "selective_scan",
        "causal_conv1d",
        "selective_state_update",
    }
    for group in groups:
        assert len({spec.shape for spec in group}) == 1 and {spec.device for spec in group} == {"cuda"}
        assert len(set(group)) == len(group)
        for spec in group:
            half_wanted = spec.backend in (*OURS, "mamba_ssm", "torch")
            assert ("bfloat16" in spec.tags) == half_wanted
    assert any(spec.backend == "mamba_ssm" for group in groups for spec in group) == gpu


def test_kernels_of_a_gpu_cover_the_bars_and_start_with_them(gpu):
    groups = gpu_kernels.groups("cuda", quick=False)
    specs = [spec for group in groups for spec in group if spec.op == "selective_scan"]
    assert {spec.shape for spec in groups[0]} == {gpu_kernels.TRAINING}
    assert {spec.shape.dim for spec in specs} == {1536, 4096, 8192}
    assert {spec.shape.batch for spec in specs} == {1, 4, 8, 16}
    assert {512, 2048, 16_384, 65_536} <= {spec.shape.seqlen for spec in specs}
    for backend in ("cuda", "triton"):
        for direction in ("fwd", "fwdbwd"):
            tags = {spec.tags for spec in groups[0] if (spec.backend, spec.direction) == (backend, direction)}
            assert {("bfloat16",), ("bfloat16", "state-offset"), ("bfloat16", "initial-state")} <= tags
    assert {spec.dtype.itemsize for spec in specs if spec.backend == "cuda"} == {2, 4}
    loops = [spec for spec in specs if spec.backend == "transformers"]
    assert loops and all(spec.shape.batch * spec.shape.dim * spec.shape.seqlen <= plans.LOOP_ELEMENTS for spec in loops)
    # the largest takes less than half of 80 GiB with its gradients, twice: inputs and results of a forward and backward
    most = max(14 * spec.dtype.itemsize * spec.shape.batch * spec.shape.dim * spec.shape.seqlen for spec in specs)
    assert most < 40 * 2**30


def test_steps_of_a_gpu_have_a_peer_that_runs_there(gpu):
    for group in decoding.steps(decoding.STEPS["cuda"], ["cuda", "triton"], "cuda"):
        peer = "mamba_ssm" if gpu else "transformers"
        assert [spec.backend for spec in group if spec.backend not in OURS] == [peer]


def test_plan_of_a_cpu_runs_every_peer_that_is_there(monkeypatch):
    monkeypatch.setattr(plans, "available", lambda op, device: ["cpu"])
    names = ("mambapy", "unbind loop", "transformers", "plain C++")
    monkeypatch.setattr(plans, "usable", lambda device: ({name: PEERS[name] for name in names}, {}))
    groups = plans.plan("cpu", "quick")
    timed = {(spec.backend, spec.direction) for group in groups for spec in group if spec.op == "selective_scan"}
    assert timed == {
        *((name, "fwd") for name in ("cpu", *names)),
        *((name, "fwdbwd") for name in ("cpu", "mambapy", "unbind loop")),
    }
    assert all(spec.tags in ((), ("silu",), ("channels-first",)) for group in groups for spec in group)

from dataclasses import replace

import pytest
import torch

from benchmarks import step_cases, training_step
from benchmarks.step_cases import (
    GemmCase,
    StepCase,
    StepSpec,
    check_losses,
    forget_models,
    memory_probe,
    products,
    verify_small,
)
from benchmarks.worker import Workers
from ssmtune.measure import results
from ssmtune.measure.timing import Disagreement, Lap
from ssmtune.mixers.selective_mixer import SelectiveMixer

TINY = StepSpec("reference", "full", 2, 12, layers=2, width=16, vocabulary=32, dstate=8)


@pytest.fixture(autouse=True)
def _own_models():
    yield
    forget_models()


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, method="state-offset"),
        replace(TINY, method="lora"),
        replace(TINY, backend="mambapy"),
        replace(TINY, backend="unbind loop"),
    ],
    ids=lambda spec: f"{spec.backend}-{spec.method}",
)
def test_verify_small_accepts_every_implementation(spec):
    if spec.backend == "mambapy":
        pytest.importorskip("mambapy")
    verify_small(spec)


@pytest.mark.parametrize("method", ["full", "state-offset"])
def test_verify_small_refuses_a_wrong_scan(method, monkeypatch):
    right = SelectiveMixer.scan_operator

    def planted(u, *arguments, **options):
        result = right(u, *arguments, **options)
        factor = 1.01 if u.dtype == torch.float32 else 1.0
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(SelectiveMixer, "scan_operator", staticmethod(planted))
    with pytest.raises(Disagreement):
        verify_small(replace(TINY, method=method))


def test_transformers_without_the_fused_block_runs_its_scan_alone(monkeypatch):
    modeling = step_cases.modeling_mamba
    # as with mamba_ssm and without causal_conv1d
    monkeypatch.setattr(modeling, "mamba_inner_fn", lambda *_, **__: pytest.fail("the fused block ran"))
    monkeypatch.setattr(step_cases, "find_spec", lambda name: None)
    fused, ours = StepCase(replace(TINY, backend="transformers")), StepCase(TINY)
    fused.time(), ours.time()
    check_losses([fused, ours])


def test_check_losses_refuses_another_model():
    first, second = StepCase(TINY), StepCase(replace(TINY, backend="unbind loop"))
    first.time(), second.time()
    check_losses([first, second])
    second.losses().append(first.losses()[0] * 1.001)
    with pytest.raises(Disagreement, match="cannot be compared"):
        check_losses([first, second])


def test_products_of_full_fine_tuning_are_all_three_of_every_linear_layer():
    case = StepCase(TINY)
    found = products(case.model, case.tokens)
    assert len(found) == 2 * 4 + 1  # in_proj, x_proj, dt_proj, out_proj; lm_head
    assert all(product.input_gradient and product.weight_gradient for product in found)
    assert {product.rows for product in found} == {2 * 12}


def test_products_below_the_lowest_tuned_state_have_no_gradient():
    case = StepCase(replace(TINY, method="state-offset"))
    found = products(case.model, case.tokens)
    assert not any(product.weight_gradient for product in found)
    # in_proj, x_proj and dt_proj of the first layer lie below its state offset
    assert [product.input_gradient for product in found] == [False] * 3 + [True] * 6


def test_gemm_case_runs_forward_and_backward_products():
    case = GemmCase(replace(TINY, backend="gemm"))
    assert all(isinstance(lap, Lap) for lap in case.time())
    assert len(case.time()) == 2
    assert {role for role, _, _ in case.buffers} == {"x", "y", "dx", "dy", "dw"}


def test_run_stores_times_and_memory(tmp_path, monkeypatch, capsys):
    groups = [[TINY, replace(TINY, backend="gemm"), replace(TINY, backend="unbind loop")]]
    monkeypatch.setattr(training_step, "groups", lambda backend, quick: groups)
    monkeypatch.setattr(Workers, "case", lambda workers, spec: spec.case())  # no other processes
    monkeypatch.setattr(training_step, "peak_memory", lambda probe, spec, threads: 5 * 2**20)
    threads = torch.get_num_threads()
    try:
        assert training_step.main(["--quick", "--backend", "reference", "--csv", str(tmp_path / "out.csv")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = results.read(tmp_path / "out.csv")
    assert {(row.backend, row.metric) for row in rows} == {
        (backend, metric)
        for backend in ("reference", "gemm", "unbind loop")
        for metric in ("cpu time", "wall time", "peak memory")
        if (backend, metric) != ("gemm", "peak memory")
    }
    assert {row.variant for row in rows} == {"full 2 layers"}
    assert {row.median for row in rows if row.unit == "MiB"} == {5.0}
    assert "MiB" in capsys.readouterr().out


def test_memory_probe_yields_before_the_work_with_no_gradients_left_over():
    steps = memory_probe(TINY)
    assert next(steps) is None
    assert all(parameter.grad is None for parameter in StepCase(TINY).model.parameters())
    assert next(steps, "done") == "done"


def test_groups_compare_like_with_like():
    for group in (*training_step.groups("cpu", False), *training_step.groups("cpu", True)):
        assert len({(spec.batch, spec.seqlen, spec.layers, spec.width) for spec in group}) == 1
        assert len(set(group)) == len(group)

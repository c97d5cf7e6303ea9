import pytest
import torch

from benchmarks import activation_memory
from benchmarks.activation_memory import ALL_KEPT, DEFAULT, FUSED, METHODS, SCAN_TOO, TRANSFORMERS, UNFUSED
from benchmarks.step_cases import StepSpec
from ssmtune.measure import results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_mixer_keeps_at_most_three_fifths_of_what_the_scan_of_mamba_ssm_keeps(method, dtype):
    kept = activation_memory.count(StepSpec("cpu", method, 2, 64, layers=1, width=512, vocabulary=64, dtype=dtype))
    assert kept[DEFAULT] <= 0.6 * kept[UNFUSED] < kept[TRANSFORMERS]
    assert kept[SCAN_TOO] < kept[DEFAULT] < kept[ALL_KEPT]
    if method != "lora":
        # mamba_ssm's fused block trains neither states nor LoRA on the projections it takes the weights of.
        assert kept[SCAN_TOO] <= 0.75 * kept[FUSED]


def test_a_frozen_mixer_keeps_the_gate_and_what_reads_the_state_for_its_own_offset_alone():
    spec = StepSpec("cpu", "state-offset", 2, 64, layers=1, width=64, vocabulary=64)
    model = activation_memory.build(spec, torch.float32)
    (_, mixer), one = activation_memory.find_mixers(model)[0], 2 * 64 * 128 * 4
    hidden = torch.randn(2, 64, 64)
    for name in (ALL_KEPT, DEFAULT, SCAN_TOO):
        activation_memory.patch(model, recompute=activation_memory.RECOMPUTE[name])
        kept = activation_memory.kept_bytes(mixer, lambda: mixer(hidden))
        # x lies beside the gate, and C beside dt and B.
        assert kept == 2 * one + 2 * 64 * (mixer.time_step_rank + 32) * 4


def test_run_stores_bytes_and_times(tmp_path, capsys):
    assert activation_memory.main(["--quick", "--csv", str(tmp_path / "out.csv")]) == 0
    rows = results.read(tmp_path / "out.csv")
    assert {row.metric for row in rows} == {"kept", "cpu time"}
    assert {row.backend for row in rows if row.metric == "cpu time"} == {ALL_KEPT, DEFAULT, SCAN_TOO}
    assert "0.00" not in capsys.readouterr().out

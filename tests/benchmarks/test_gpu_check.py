"""The parts of the check on a GPU run one after the other; one that fails or hangs loses nothing of the others."""

import sys

import pytest

from benchmarks import gpu_check, stored
from benchmarks.gpu_check import Part
from ssmtune.measure import results

PRINTS = "import sys; print('the end'); sys.exit(int(sys.argv[1]))"


@pytest.fixture
def parts(monkeypatch):
    def install(*found: Part):
        monkeypatch.setattr(gpu_check, "parts", lambda device, csv: found)

    return install


def command(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def test_a_part_that_fails_or_hangs_leaves_its_output_and_the_rest_goes_on(parts, tmp_path, capsys):
    hangs = "print('before', flush=True); import time; time.sleep(600)"
    parts(
        Part("fails", command(PRINTS, "3"), 60),
        Part("hangs", command(hangs), 2),
        Part("passes", command(PRINTS, "0"), 60),
    )
    assert gpu_check.run(tmp_path, "cpu") == 1
    printed = capsys.readouterr().out
    assert "fails: exit status 3" in printed and "hangs: killed after 2 s" in printed and "passes: passed" in printed
    assert (tmp_path / "fails.log").read_text() == "the end\n"
    assert (tmp_path / "hangs.log").read_text() == "before\n"


def test_parts_that_all_pass_are_a_success_and_without_time_none_starts(parts, tmp_path, capsys):
    parts(Part("passes", command(PRINTS, "0"), 60))
    assert gpu_check.run(tmp_path, "cpu") == 0
    assert gpu_check.run(tmp_path, "cpu", minutes=0) == 1
    assert "passes: no time left" in capsys.readouterr().out


def test_tables_and_picture_are_made_of_what_was_measured(parts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    csv = tmp_path / stored.default_file(results.device_name()).name
    words = ("--quick", "--device", "cpu", "--csv", str(csv))
    parts(Part("kernels", (sys.executable, "-m", "benchmarks.gpu_kernels", *words), 120))
    assert gpu_check.run(tmp_path, "cpu") == 0, (tmp_path / "kernels.log").read_text()
    assert "#### selective_scan" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "scan.png").stat().st_size > 10_000


def test_parts_of_a_gpu_fit_in_the_time_of_all(tmp_path):
    found = gpu_check.parts("cuda", tmp_path / "a.csv")
    assert [part.name for part in found] == ["tests", "kernels", "decoding", "training"]
    assert sum(part.seconds for part in found) <= 60 * gpu_check.MINUTES
    assert [part.name for part in gpu_check.parts("cpu", tmp_path / "a.csv")] == [part.name for part in found]


def test_mamba_ssm_that_cannot_be_built_is_left_out(parts, tmp_path, capsys):
    parts(Part("passes", command(PRINTS, "0"), 60))
    wrong = tmp_path / "mamba_ssm-1.tar.gz"
    wrong.write_text("no archive")
    assert gpu_check.run(tmp_path, "cpu", mamba_ssm=str(wrong)) == 0
    assert "mamba_ssm: not built, it is left out" in capsys.readouterr().out


def test_one_target_takes_out_all_that_setup_names():
    setup = """    cc_flag.append("-gencode")
    cc_flag.append("arch=compute_75,code=sm_75")
    if bare_metal_version >= Version("11.8"):
        cc_flag.append("-gencode")
        cc_flag.append("arch=compute_90,code=sm_90")
"""
    code = gpu_check.one_target(setup)
    assert "compute_" not in code and "gencode" not in code
    assert code.count("pass") == 4


def test_without_a_gpu_says_how_to_try_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "--device cpu" in capsys.readouterr().err

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from ssmtune import memory
from ssmtune.config import ConfigError
from ssmtune.progress import ProgressLine
from ssmtune.run_directory import RunDirectory, environment, whole_folder, write_json, write_whole


def test_whole_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "adapter"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(OSError), whole_folder(target) as folder:
        (folder / "b").write_text("2")
        raise OSError("full")
    assert [path.name for path in target.iterdir()] == ["a"]
    with whole_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "rows": [float("inf"), 1.5], "path": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "rows": [None, 1.5], "path": str(tmp_path)}


def test_clear_removes_a_run_and_nothing_else(tmp_path):
    run = RunDirectory(tmp_path)
    for path in (run.metrics, run.summary, tmp_path / "mine.txt", tmp_path / ".config.yaml.partial"):
        path.write_text("x")
    for folder in (run.adapter, run.checkpoint(3), tmp_path / "own"):
        folder.mkdir(parents=True)
    run.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "own"]


def test_last_checkpoint_goes_by_its_step(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.last_checkpoint() is None
    for step in (900, 1000, 20):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".new.partial").mkdir()
    assert run.last_checkpoint() == run.checkpoint(1000)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory(tmp_path / "run").check()


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (3 << 40, "3.0 TB")])
def test_readable_sizes(count, text):
    assert memory.readable(count) == text


def test_peak_sees_what_was_freed():
    if torch.cuda.is_available():
        pytest.skip("measures the allocator of the GPU instead")
    # in a process of its own: the tests before this one have freed memory that a block could be taken from, and have
    # reached a peak that not every system lets a process reset
    script = """
import mmap
from ssmtune import memory
memory.reset_peak()
before = memory.peak_bytes()
with mmap.mmap(-1, 64 << 20) as block:
    block.write(b"1" * len(block))
print(memory.peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 32 << 20


def test_estimate_grows_with_what_costs_memory(tiny_mamba):
    frozen = tiny_mamba.requires_grad_(False)
    least = memory.estimate_bytes(frozen, 4, 64)
    assert memory.estimate_bytes(frozen, 4, 64, checkpointing=True) < least < memory.estimate_bytes(frozen, 8, 64)
    assert memory.estimate_bytes(frozen.requires_grad_(True), 4, 64) > least
    assert memory.estimate_bytes(frozen, 4, 64, forward_only=True) < least


def test_progress_off_a_terminal_is_plain_lines(capsys):
    line = ProgressLine(10)
    line.step(5)
    line.log({"step": 5, "loss": 1.25, "lr": 1e-3, "tokens_per_second": 1234.5})
    line.log({"step": 5, "dev_loss": 2.0})
    line.close()
    shown = capsys.readouterr()
    assert shown.err == ""
    first, second = shown.out.splitlines()
    assert first.startswith("step 5/10  loss 1.2500  lr 1.0e-03  1,234 tok/s  0:00:0") and first.endswith(" left")
    assert second == "step 5/10  dev loss 2.0000"


def test_progress_on_a_terminal_is_a_bar_without_colours(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line = ProgressLine(10)
    line.step(5)
    line.log({"step": 5, "loss": 1.25, "lr": 1e-3, "tokens_per_second": 1234.5})
    line.write("  sample: a")
    line.close()
    shown = capsys.readouterr()
    assert "loss 1.2500" in shown.err and "5/10" in shown.err and "\x1b[3" not in shown.err
    assert "sample: a" in shown.out + shown.err


def test_progress_can_be_turned_off(capsys):
    line = ProgressLine(10, enabled=False)
    line.log({"step": 5, "dev_loss": 2.0})
    line.write("x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "module, command",
    [
        ("ssmtune.__main__", "ssmtune --steps 5"),
        ("benchmarks.study", "python -m benchmarks.study --steps 5"),
        (None, "ssmtune --steps 5"),
    ],
)
def test_the_command_can_be_typed_again(module, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ssmtune" if module is None else "/src/some.py", "--steps", "5"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and ModuleSpec(module, None))
    assert environment()["command"] == command

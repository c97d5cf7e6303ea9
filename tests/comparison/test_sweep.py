import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from safetensors import SafetensorError

from ssmtune import cell_runs, cells
from ssmtune.comparison import run_comparison
from ssmtune.comparison_directory import at_work_in, claim
from ssmtune.config import ConfigError
from ssmtune.disk_space import DiskFull
from ssmtune.summary import summarize
from ssmtune.sweep_progress import SweepProgress

TIMES = ("seconds", "tokens_per_second", "peak_memory", "decode_ms", "step_ms", "switch_ms", "decode_ratio")


def table(out):
    """What a report shows, without what is measured in seconds and bytes."""
    [task] = summarize(out).tasks
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in TIMES} for row in task.rows]


def weights(out):
    return {file.relative_to(out): file.read_bytes() for file in out.rglob("adapters/*/*/*.safetensors")}


def assert_same(out, undisturbed):
    assert table(out) == table(undisturbed) and weights(out) == weights(undisturbed)


def test_kill_9_loses_the_running_cell_alone(undisturbed, tmp_path):
    study, undisturbed = undisturbed
    out, chance, found = tmp_path / "killed", random.Random(0), 0
    # forked, so that it has nothing to import
    context = multiprocessing.get_context("fork")
    for finished in (0, 1, 3):
        process = context.Process(target=run_comparison, args=(study, out))
        process.start()
        while len(list(out.glob("cells/*/*.json"))) < finished and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        stored = [json.loads(file.read_text()) for file in out.glob("cells/*/*.json")]
        assert len(stored) >= max(finished, found) and all(record["status"] == "success" for record in stored)
        found = len(stored)
    assert found < 5
    run_comparison(study, out)
    assert_same(out, undisturbed)
    assert not list(out.rglob(".*"))


class KillsOnce(SweepProgress):
    """Kills a worker process after the first run that was finished."""

    def __init__(self):
        super().__init__(enabled=False)
        self.killed = False

    def finished(self, cell, record):
        super().finished(cell, record)
        if not self.killed:
            self.killed = True
            # one is about to be handed a cell, the other is at work
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.1)


def test_processes_give_what_one_process_gives(undisturbed, tmp_path):
    study, undisturbed = undisturbed
    run_comparison(study, tmp_path / "out", processes=2)
    assert_same(tmp_path / "out", undisturbed)


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run(undisturbed, tmp_path):
    study, undisturbed = undisturbed
    out = tmp_path / "out"
    run_comparison(study, out, processes=2, progress=KillsOnce())
    failed = [r for f in out.glob("cells/*/*.json") if (r := json.loads(f.read_text()))["status"] != "success"]
    assert len(failed) <= 1 and all("was ended by SIGKILL" in record["error"] for record in failed)
    if failed:
        run_comparison(study, out)
    assert_same(out, undisturbed)


def test_a_full_disk_stops_the_sweep_and_loses_nothing(undisturbed, tmp_path, monkeypatch):
    study, undisturbed = undisturbed
    out, write, written = tmp_path / "out", cells.write_json, []

    def full(path, values):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, values)

    monkeypatch.setattr(cells, "write_json", full)
    with pytest.raises(DiskFull, match="(?s)no space is left for .*out or .*stored whole.*repeat the same command"):
        run_comparison(study, out)
    assert len(list(out.glob("cells/*/*.json"))) == 2
    monkeypatch.setattr(cells, "write_json", write)
    save = cell_runs.save_weights

    def no_room(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cell_runs, "save_weights", no_room)
    with pytest.raises(DiskFull, match="os error 28"):
        run_comparison(study, out)
    monkeypatch.setattr(cell_runs, "save_weights", save)
    run_comparison(study, out)
    assert_same(out, undisturbed)


def test_two_sweeps_in_one_directory_are_refused(small, tmp_path):
    with at_work_in(tmp_path / "out"), pytest.raises(ConfigError, match="another process is running the comparison"):
        run_comparison(small, tmp_path / "out")


def test_a_sweep_killed_as_it_began_does_not_block_the_next(tmp_path):
    (tmp_path / ".comparison.json.partial").write_text('{"form')
    claim(tmp_path, {"format": 2})
    assert json.loads((tmp_path / "comparison.json").read_text()) == {"format": 2}


def test_ray_that_is_not_there_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ssmtune\[ray\]'"):
        run_comparison(small, tmp_path / "out", ray="local")


@pytest.mark.slow
def test_ray_gives_what_one_process_gives(undisturbed, tmp_path):
    study, undisturbed = undisturbed
    pytest.importorskip("ray")
    run_comparison(study, tmp_path / "out", processes=2, ray="local")
    assert_same(tmp_path / "out", undisturbed)

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import ssmtune
from ssmtune.cli.env import OPERATORS, collect, render
from ssmtune.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def test_text_names_versions_and_every_backend(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for expected in (ssmtune.__version__, platform.python_version(), torch.__version__, *OPERATORS, "reference"):
        assert expected in text
    # made for pasting: no colours, no line endings to trip over
    assert "\x1b" not in text and "\t" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ssmtune"] == ssmtune.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert report["backends"].keys() == set(OPERATORS)
    assert report["backends"]["selective_scan"]["reference"] is None


def test_missing_kernels_and_tools_come_with_a_remedy():
    report = collect()
    report["native"] = {
        "loaded": False,
        "capability": None,
        "why_not": "not built",
        "build_tools": {"c++": None, "cmake": None, "ninja": "/usr/bin/ninja"},
    }
    text = render(report)
    assert "not built" in text
    assert "missing: apt install g++" in text
    assert "missing: pip install cmake" in text
    assert "/usr/bin/ninja" in text


def test_without_native(tmp_path):
    environment = {**os.environ, "SSMTUNE_NO_NATIVE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ssmtune", "env"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "switched off by SSMTUNE_NO_NATIVE" in done.stdout
    assert "SSMTUNE_NO_NATIVE" in done.stdout


def test_without_torch(tmp_path):
    # -S: no site-packages, the standard library alone
    done = subprocess.run(
        [sys.executable, "-S", "-m", "ssmtune", "env"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in done.stdout
    assert "pip install torch" in done.stdout

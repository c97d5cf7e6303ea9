import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssmtune

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ssmtune.__all__)
def test_public_names_resolve(name):
    assert getattr(ssmtune, name) is not None
    assert name in dir(ssmtune)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'selective_scam'"):
        ssmtune.selective_scam  # noqa: B018


def run_python(code, cwd, **environment):
    environment = {**os.environ, "SSMTUNE_LAZY": "0", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_import_registers_with_peft(tmp_path):
    code = """
import ssmtune
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert {"STATE_OFFSET", "INITIAL_STATE"} <= {getattr(k, "value", k) for k in PEFT_TYPE_TO_CONFIG_MAPPING}
"""
    done = run_python(code, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_lazy_import_leaves_torch_alone(tmp_path):
    code = "import sys, ssmtune; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    done = run_python(code, tmp_path, PYTHONPATH=str(ROOT), SSMTUNE_LAZY="1")
    assert done.returncode == 0, done.stderr


def test_kernels_of_a_checkout_that_is_not_installed(tmp_path):
    # -S: no site-packages, hence no editable install either
    code = """
import sys
sys.path.insert(0, {root!r})
from importlib.util import find_spec
assert find_spec("ssmtune.triton_kernels.selective_state_update").origin.startswith({root!r})
assert find_spec("triton_kernels") is None or find_spec("triton_kernels").origin is None
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code.format(root=str(ROOT))],
        cwd=tmp_path,
        env={**os.environ, "SSMTUNE_LAZY": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr

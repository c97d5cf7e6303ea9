import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is run from a checkout and never installed
    sys.path.insert(0, str(ROOT))

from ssmtune.measure import session, timing  # noqa: E402
from ssmtune.measure.scan_cases import forget_inputs  # noqa: E402


@pytest.fixture(autouse=True)
def _own_inputs():
    yield
    forget_inputs()


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    """Two runs of each case, on one thread: what is tested is never the time."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(
        session, "interleave", lambda verified, seconds, most: timing.interleave(verified, 0.0, least=2, most=2)
    )

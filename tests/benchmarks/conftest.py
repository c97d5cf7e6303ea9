import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is run from a checkout and never installed
    sys.path.insert(0, str(ROOT))

from benchmarks.scan_cases import forget_inputs  # noqa: E402


@pytest.fixture(autouse=True)
def _own_inputs():
    yield
    forget_inputs()

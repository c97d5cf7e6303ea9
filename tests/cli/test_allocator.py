import os
import subprocess
import sys

import pytest

PROGRAM = """
from ssmtune.cli.allocator import keep_freed_memory
kept = keep_freed_memory()
import torch
block = torch.ones(4_000_000); del block  # 16 MB
resident = open("/proc/self/statm").read().split()[1]
print(kept, int(resident) * 4096)
"""


def resident_after_free(**variables: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | variables, capture_output=True, text=True, check=True
    )
    kept, resident = answer.stdout.split()
    return kept, int(resident)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_stays_with_the_process():
    kept, with_memory = resident_after_free()
    if kept == "False":
        pytest.skip("not glibc")
    outside, without = resident_after_free(MALLOC_TRIM_THRESHOLD_="131072")
    assert outside == "False"  # what the user sets is left alone
    assert with_memory - without > 12 << 20

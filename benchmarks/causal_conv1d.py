"""Times ssmtune.causal_conv1d with silu against torch's convolution on the same channels-last view.

`python -m benchmarks.causal_conv1d` appends its rows to benchmarks/results/<device>.csv.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shapes import MAIN, QUICK
from benchmarks.stored import command_line, store
from ssmtune.measure import results
from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.session import Session


def run(quick: bool = False, csv: Path | None = None) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: one small shape, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    environment = results.environment()
    print(environment)
    session = Session(environment, seconds=0.2 if quick else 2.0, threads=(1, 2))
    for shape in QUICK if quick else MAIN:
        for direction in ("fwd", "fwdbwd"):
            specs = [ConvSpec(shape, direction, backend) for backend in ("cpu", "torch")]
            session.measure([*specs, ConvSpec(shape, direction, "cpu", ("silu", "bfloat16"))])
    store(environment, session.rows, quick, csv)
    return 1 if session.wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    return run(**vars(command_line("causal_conv1d", __doc__, quick="one small shape").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

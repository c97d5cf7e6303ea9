"""Times ssmtune.selective_scan against other implementations of the same scan.

`python -m benchmarks.selective_scan` measures everything and appends its rows to benchmarks/results/<device>.csv;
with --quick it takes one small shape, needs half a minute and stores nothing.
"""

import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peak_memory import peak_memory
from benchmarks.shapes import LENGTHS, MAIN, MEMORY, QUADRATIC, QUICK, QUICK_LENGTHS
from benchmarks.stored import command_line, store
from benchmarks.worker import KEPT, WorkerSession
from ssmtune.measure import results
from ssmtune.measure.inputs import Shape
from ssmtune.measure.peers import PEERS, usable
from ssmtune.measure.scan_cases import ScanSpec, memory_probe

OP = "selective_scan"
PARTS = ("shapes", "quadratic", "lengths", "memory")
VARIANTS = (
    ("fwd",),
    ("fwdbwd",),
    ("fwdbwd", "full"),
    ("fwd", "channels-first"),
    ("fwdbwd", "channels-first"),
    ("fwd", "initial-state"),
    ("fwdbwd", "initial-state"),
    ("fwd", "state-offset"),
    ("fwdbwd", "state-offset"),
    ("fwdbwd", "offset-only"),
    ("fwd", "bfloat16"),
    ("fwdbwd", "bfloat16"),
    ("fwd", "float16"),
    ("fwdbwd", "float16"),
)
"""What is timed of ssmtune's own scan at each shape: the direction, and what differs from the default."""


class ScanSession(WorkerSession):
    """One run of the scan: of which backend of ssmtune, against which peers, in which processes."""

    def __init__(self, backend: str, peers: Sequence[str], environments: Sequence[str], *args, **options):
        super().__init__(*args, **options)
        self.backend = backend
        self.peers = tuple(peers)
        self.environments = tuple(environments)  # tags of worker.ENVIRONMENTS that mean something here

    def ours(self, shape: Shape, direction: str, *tags: str) -> ScanSpec:
        """A scan of ssmtune."""
        return ScanSpec(shape, direction, self.backend, tags)


def measure_shapes(session: ScanSession, shapes: Sequence[Shape]) -> None:
    """ssmtune and every peer at each shape; and what other layouts, state inputs and gradients cost ssmtune."""
    for shape in shapes:
        specs = [session.ours(shape, *variant) for variant in VARIANTS]
        for name in session.peers:
            directions = ("fwd", "fwdbwd") if PEERS[name].linear_backward else ("fwd",)
            specs += [ScanSpec(shape, direction, name, PEERS[name].tags) for direction in directions]
        if shape == shapes[0] and "unbind loop" in session.peers:  # for its rounding errors of A, D and delta_bias
            specs.append(ScanSpec(shape, "fwdbwd", "unbind loop", ("full",)))
        if KEPT in session.environments:
            specs += [replace(spec, tags=(*spec.tags, KEPT)) for spec in specs]
        if "avx2" in session.environments:
            specs += [session.ours(shape, direction, "avx2") for direction in ("fwd", "fwdbwd")]
        session.measure(specs)


def measure_quadratic(session: ScanSession, shapes: Sequence[Shape]) -> None:
    """transformers' backward pass, at lengths where one can wait for it, beside two that are linear in seqlen."""
    names = [name for name in ("transformers", "unbind loop") if name in session.peers]
    for shape in shapes:
        peers = [ScanSpec(shape, "fwdbwd", name) for name in names]
        session.measure([session.ours(shape, "fwdbwd"), *peers], session.threads[:1])


def measure_lengths(session: ScanSession, shapes: Sequence[Shape]) -> None:
    """Time against seqlen, ssmtune alone."""
    for shape in shapes:
        variants = [(), (KEPT,)] if KEPT in session.environments else [()]
        specs = [session.ours(shape, way, *tags) for tags in variants for way in ("fwd", "fwdbwd")]
        session.measure(specs, session.threads[:1], most=15)


def measure_memory(session: ScanSession, shape: Shape) -> None:
    """Peak memory of each pass, above its inputs, in units of one (batch, dim, seqlen) tensor."""
    specs = [session.ours(shape, "fwd"), session.ours(shape, "fwdbwd"), session.ours(shape, "fwdbwd", "full")]
    specs += [ScanSpec(shape, "fwdbwd", name) for name in ("mambapy", "unbind loop") if name in session.peers]
    tensor = 4 * shape.batch * shape.dim * shape.seqlen
    for spec in specs:
        value = peak_memory(memory_probe, spec, threads=session.threads[0]) / tensor
        session.add(spec, session.threads[0], "peak memory", "tensors", value)
        print(
            f"  {spec.direction:6}  {shape!s:>16}  {spec.backend:12}  {spec.variant:26}{value:10.2f} tensors",
            flush=True,
        )


def run(quick: bool = False, csv: Path | None = None, backend: str = "cpu", parts: Sequence[str] = PARTS) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: one small shape and short lengths, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        backend: of ssmtune, cpu or reference.
        parts: a choice of PARTS.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    from ssmtune.ops import available_backends

    reason = available_backends(OP)[backend]
    if reason is not None:
        print(f"error: backend {backend!r} cannot be measured: {reason}", file=sys.stderr)
        return 1
    there, missing = usable()
    environment = results.environment()
    print(environment)
    for name, why in missing.items():
        print(f"  left out: {name}: {why}")
    threads = (1, 2) if torch.get_num_threads() > 1 else (1,)
    seconds = 0.05 if quick else 0.4
    session = ScanSession(backend, there, _environments(backend, quick), environment, seconds=seconds, threads=threads)
    for part in parts:
        print(part)
        with session:  # processes end, and their memory is free, with each part
            _measure_part(session, part, quick)
    store(environment, session.rows, quick, csv)
    return 1 if session.wrong else 0


def _measure_part(session: ScanSession, part: str, quick: bool) -> None:
    if part == "shapes":
        measure_shapes(session, QUICK if quick else MAIN)
    elif part == "quadratic":
        measure_quadratic(session, [replace(shape, dim=64) for shape in QUADRATIC] if quick else QUADRATIC)
    elif part == "lengths":
        measure_lengths(session, QUICK_LENGTHS if quick else LENGTHS)
    elif part == "memory":
        measure_memory(session, MAIN[0] if quick else MEMORY)


def _environments(backend: str, quick: bool) -> tuple[str, ...]:
    """Tags of the processes of their own that mean something here."""
    from ssmtune import native

    wider = ("avx2",) if backend == "cpu" and native.cpu_capability().startswith("avx512") else ()
    return wider if quick or platform.libc_ver()[0] != "glibc" else (*wider, KEPT)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = command_line("selective_scan", __doc__, quick="one small shape, short lengths")
    parser.add_argument("--backend", default="cpu", choices=("cpu", "reference"), help="of ssmtune (default: cpu)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

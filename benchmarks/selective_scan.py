"""Times ssmtune.selective_scan against other implementations of the same scan.

`python -m benchmarks.selective_scan` measures everything and appends its rows to benchmarks/results/<device>.csv;
with --quick it takes one small shape, needs half a minute and stores nothing.
"""

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.measure import (
    Disagreement,
    Summary,
    Times,
    Verified,
    interleave,
    peak_memory,
    tolerances,
    verify,
)
from benchmarks.peers import PEERS, usable
from benchmarks.scan_cases import OURS, Spec, expected, forget_inputs, memory_probe
from benchmarks.shapes import LENGTHS, MAIN, MEMORY, QUADRATIC, QUICK, QUICK_LENGTHS, Shape
from benchmarks.worker import KEPT, Workers

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
FULL_VERIFICATION = 2048
"""Sequences longer than this are verified on a few channels: the float64 recurrence takes time."""


@dataclass
class Settings:
    """What one run does."""

    device: str
    backend: str  # of ssmtune
    threads: tuple[int, ...]
    seconds: float
    quick: bool
    peers: tuple[str, ...]
    environments: tuple[str, ...]  # tags of worker.ENVIRONMENTS that mean something here


class Session:
    """Collects and prints the rows of one run."""

    def __init__(self, settings: Settings, environment: results.Environment):
        self.settings, self.environment = settings, environment
        self.workers = Workers()
        self.rows: list[results.Row] = []
        self.wrong: list[Spec] = []

    def measure(self, specs: Sequence[Spec], threads: Iterable[int], most: int = 40) -> None:
        """Verify each spec, then time all of them in turns, once for each number of threads."""
        self.workers.threads = max(self.settings.threads)
        verified = self._verify(specs)
        for count in threads if verified else ():
            self.workers.threads = count
            times = interleave(verified, self.settings.seconds, most=most)
            for entry, sample in zip(verified, times, strict=True):
                self._record(entry, sample, count)
        self.workers.forget(forget_inputs)

    def _verify(self, specs: Sequence[Spec]) -> list[Verified]:
        right: dict[Spec, dict[str, torch.Tensor]] = {}
        for spec in specs:
            oracle = spec.oracle()
            if oracle not in right:
                right[oracle] = expected(oracle, _looked_at(spec.shape))
        forget_inputs()  # the long ones take gigabytes, and the processes that run the cases make their own
        verified = []
        for spec in specs:
            wanted = {name: value for name, value in right[spec.oracle()].items() if name == "out" or name in spec.wrt}
            try:
                entry = verify(self.workers.case(spec), wanted, _looked_at(spec.shape), *tolerances(spec.dtype))
            except Disagreement as wrong:
                self.wrong.append(spec)
                print(f"error: {wrong}", file=sys.stderr, flush=True)
                continue
            verified.append(entry)
            for name, value in entry.errors.items():
                self.add(spec, max(self.settings.threads), f"error of {name}", "1", value)
        return verified

    def _record(self, entry: Verified, times: Times, threads: int) -> None:
        spec = entry.case.spec
        for clock in ("cpu", "wall"):
            self.add(spec, threads, f"{clock} time", "ms", times.summary("total", clock))
            if len(times.stages) == 2:
                self.add(replace(spec, direction="bwd"), threads, f"{clock} time", "ms", times.summary("bwd", clock))
        clock = "cpu" if threads == 1 and self.settings.device == "cpu" else "wall"
        total = times.summary("total", clock)
        print(
            f"  {spec.direction:6}  {spec.shape!s:>16}  {threads}  {spec.backend:12}  {spec.variant:26}"
            f"{total.median:10.2f} ms  ({total.p20:.2f} to {total.p80:.2f}, n = {len(times.runs)})",
            flush=True,
        )

    def add(self, spec: Spec, threads: int, metric: str, unit: str, value: Summary | float) -> None:
        """Keep one number."""
        self.rows.append(
            self.environment.row(
                value,
                op=OP,
                pass_=spec.direction,
                backend=spec.backend,
                dtype=str(spec.dtype).removeprefix("torch."),
                batch=spec.shape.batch,
                dim=spec.shape.dim,
                seqlen=spec.shape.seqlen,
                dstate=spec.shape.dstate,
                threads=threads,
                variant=spec.variant,
                metric=metric,
                unit=unit,
            )
        )


def _looked_at(shape: Shape) -> slice | None:
    """The channels that are verified: all, or four of a long sequence."""
    return slice(0, None, max(1, shape.dim // 4)) if shape.seqlen > FULL_VERIFICATION else None


def _ours(settings: Settings, shape: Shape, direction: str, *tags: str) -> Spec:
    return Spec(shape, direction, settings.backend, tags, settings.device)


def measure_shapes(session: Session, shapes: Sequence[Shape]) -> None:
    """ssmtune and every peer at each shape; and what other layouts, state inputs and gradients cost ssmtune."""
    settings = session.settings
    for shape in shapes:
        specs = [_ours(settings, shape, *variant) for variant in VARIANTS]
        for name in settings.peers:
            tags = ("channels-first",) if name == "plain C++" else ()
            directions = ("fwd", "fwdbwd") if PEERS[name].linear_backward else ("fwd",)
            specs += [Spec(shape, direction, name, tags, settings.device) for direction in directions]
        if shape == shapes[0] and "unbind loop" in settings.peers:  # for its rounding errors of A, D and delta_bias
            specs.append(Spec(shape, "fwdbwd", "unbind loop", ("full",)))
        if KEPT in settings.environments:
            specs += [replace(spec, tags=(*spec.tags, KEPT)) for spec in specs]
        if "avx2" in settings.environments:
            specs += [_ours(settings, shape, direction, "avx2") for direction in ("fwd", "fwdbwd")]
        session.measure(specs, settings.threads)


def measure_quadratic(session: Session, shapes: Sequence[Shape]) -> None:
    """transformers' backward pass, at lengths where one can wait for it, beside two that are linear in seqlen."""
    settings = session.settings
    names = [name for name in ("transformers", "unbind loop") if name in settings.peers]
    for shape in shapes:
        peers = [Spec(shape, "fwdbwd", name) for name in names]
        session.measure([_ours(settings, shape, "fwdbwd"), *peers], settings.threads[:1])


def measure_lengths(session: Session, shapes: Sequence[Shape]) -> None:
    """Time against seqlen, ssmtune alone."""
    for shape in shapes:
        variants = [(), (KEPT,)] if KEPT in session.settings.environments else [()]
        specs = [_ours(session.settings, shape, way, *tags) for tags in variants for way in ("fwd", "fwdbwd")]
        session.measure(specs, session.settings.threads[:1], most=15)


def measure_memory(session: Session, shape: Shape) -> None:
    """Peak memory of each pass, above its inputs, in units of one (batch, dim, seqlen) tensor."""
    settings = session.settings
    specs = [_ours(settings, shape, "fwd"), _ours(settings, shape, "fwdbwd"), _ours(settings, shape, "fwdbwd", "full")]
    specs += [Spec(shape, "fwdbwd", name) for name in ("mambapy", "unbind loop") if name in settings.peers]
    tensor = 4 * shape.batch * shape.dim * shape.seqlen
    for spec in specs:
        value = peak_memory(memory_probe, spec, threads=settings.threads[0]) / tensor
        session.add(spec, settings.threads[0], "peak memory", "tensors", value)
        print(
            f"  {spec.direction:6}  {shape!s:>16}  {spec.backend:12}  {spec.variant:26}{value:10.2f} tensors",
            flush=True,
        )


def run(
    quick: bool = False,
    csv: Path | None = None,
    device: str = "cpu",
    backend: str | None = None,
    parts: Sequence[str] = PARTS,
) -> int:
    """Measure, print, and append to a file.

    Args:
        quick: one small shape and short lengths, and no file unless `csv` names one.
        csv: the file; benchmarks/results/<device>.csv by default.
        device: cpu or cuda.
        backend: of ssmtune; by default the compiled kernel, or the reference where there is none for the device yet.
        parts: a choice of PARTS.

    Returns:
        0 when every case was right and timed, 1 otherwise.
    """
    from ssmtune.ops import available_backends

    backend = backend or ("cpu" if device == "cpu" else "reference")
    reason = available_backends(OP)[backend]
    if reason is not None:
        print(f"error: backend {backend!r} cannot be measured: {reason}", file=sys.stderr)
        return 1
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: no GPU found (torch {torch.__version__}).\n  Leave out --device cuda.", file=sys.stderr)
        return 1
    there, missing = usable(device)
    environment = results.environment(device)
    print(environment)
    for name, why in missing.items():
        print(f"  left out: {name}: {why}")
    threads = (1, 2) if torch.get_num_threads() > 1 else (1,)
    settings = Settings(
        device, backend, threads, 0.05 if quick else 0.4, quick, tuple(there), _environments(backend, quick)
    )
    session = Session(settings, environment)
    for part in parts:
        print(part)
        with Workers() as session.workers:  # processes end, and their memory is free, with each part
            _measure_part(session, part)
    results.store(environment, session.rows, quick, csv)
    return 1 if session.wrong else 0


def _measure_part(session: Session, part: str) -> None:
    quick = session.settings.quick
    shapes = QUICK if quick else MAIN
    if part == "shapes":
        measure_shapes(session, shapes)
    elif part == "quadratic" and session.settings.device == "cpu":
        measure_quadratic(session, [replace(shape, dim=64) for shape in QUADRATIC] if quick else QUADRATIC)
    elif part == "lengths":
        measure_lengths(session, QUICK_LENGTHS if quick else LENGTHS)
    elif part == "memory" and session.settings.device == "cpu":
        measure_memory(session, MAIN[0] if quick else MEMORY)


def _environments(backend: str, quick: bool) -> tuple[str, ...]:
    """Tags of the processes of their own that mean something here."""
    from ssmtune import native

    wider = ("avx2",) if backend == "cpu" and native.cpu_capability() == "avx512" else ()
    return wider if quick or platform.libc_ver()[0] != "glibc" else (*wider, KEPT)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selective_scan", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape, short lengths; stores nothing by itself")
    parser.add_argument("--csv", type=Path, help="file to append to (default: benchmarks/results/<device>.csv)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", choices=OURS, help="of ssmtune (default: cpu; on cuda the reference)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

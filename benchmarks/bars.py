"""What the kernels are held to: each bar is a ratio of two numbers of one run, and a limit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import log

from benchmarks.shapes import MAIN
from benchmarks.worker import KEPT
from ssmtune.measure.peers import PEERS
from ssmtune.measure.results import Row, latest, time_metric

Sizes = tuple[int, int, int]

MAIN_SIZES = tuple((shape.batch, shape.dim, shape.seqlen) for shape in MAIN)
"""Where the bars of the scan apply, but for the one on its growth with seqlen."""


class Run:
    """The rows of one run, looked up by what they measured.

    With `kept`, those that were measured with memory kept between calls, under the same names; without, all others.
    """

    def __init__(self, rows: Iterable[Row], kept: bool = False):
        chosen = [row for row in rows if (KEPT in row.variant.split()) == kept]
        self.rows = [replace(row, variant=row.variant.replace(KEPT, "").strip() or "default") for row in chosen]
        self._medians = {
            (row.pass_, row.backend, (row.batch, row.dim, row.seqlen), row.threads, row.variant, row.metric): row.median
            for row in self.rows
        }

    def median(
        self, direction: str, backend: str, sizes: Sizes, threads: int, metric: str, variant: str = "default"
    ) -> float | None:
        """One number, None where it was not measured."""
        return self._medians.get((direction, backend, sizes, threads, variant, metric))

    def time(self, direction: str, backend: str, sizes: Sizes, threads: int, variant: str = "default") -> float | None:
        """In the unit of the operator."""
        return self.median(direction, backend, sizes, threads, time_metric(threads), variant)

    def main_settings(self, *backends: str) -> list[tuple[Sizes, int]]:
        """Those of `settings` at the main sizes."""
        return [place for place in self.settings(*backends) if place[0] in MAIN_SIZES]

    def settings(self, *backends: str) -> list[tuple[Sizes, int]]:
        """Sizes and threads at which all of these backends were timed, in order."""
        found = {
            (row.backend, (row.batch, row.dim, row.seqlen), row.threads) for row in self.rows if "time" in row.metric
        }
        places = sorted({(sizes, threads) for _, sizes, threads in found})
        return [place for place in places if all((backend, *place) in found for backend in backends)]


@dataclass(frozen=True)
class Bar:
    """A ratio that must be at least, or at most, a limit wherever it was measured."""

    op: str
    title: str
    ratios: Callable[[Run], list[float]]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"
    gpu: bool = False

    def holds(self, ratios: list[float]) -> bool | None:
        """None where nothing was measured."""
        if not ratios:
            return None
        above = self.at_least is None or min(ratios) >= self.at_least
        return above and (self.at_most is None or max(ratios) <= self.at_most)

    def limit(self) -> str:
        """The limit in words."""
        if self.at_least is None and self.at_most is None:
            return ""
        return f">= {self.at_least:g}{self.unit}" if self.at_least is not None else f"<= {self.at_most:g}{self.unit}"


def _divide(pairs: Iterable[tuple[float | None, float | None]]) -> list[float]:
    return [above / below for above, below in pairs if above is not None and below]


def _against(direction: str, *peers: str) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        pairs = []
        for peer in peers:
            variant = " ".join(PEERS[peer].tags) or "default"
            for sizes, threads in run.main_settings("cpu", peer):
                ours = run.time(direction, "cpu", sizes, threads)
                pairs.append((run.time(direction, peer, sizes, threads, variant), ours))
        return _divide(pairs)

    return ratios


def _variant(variant: str, *directions: str, base: str = "default") -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        return _divide(
            (run.time(direction, "cpu", *place, variant), run.time(direction, "cpu", *place, base))
            for direction in directions
            for place in run.main_settings("cpu")
        )

    return ratios


def _backward_over_forward(run: Run) -> list[float]:
    places = run.main_settings("cpu")
    return _divide((run.time("bwd", "cpu", *place), run.time("fwd", "cpu", *place)) for place in places)


def _two_threads(run: Run) -> list[float]:
    return _divide(
        (run.median(way, "cpu", sizes, 1, "wall time"), run.median(way, "cpu", sizes, 2, "wall time"))
        for way in ("fwd", "fwdbwd")
        for sizes, threads in run.main_settings("cpu")
        if threads == 2
    )


def _growth(run: Run) -> list[float]:
    """d log(time) / d log(seqlen) by least squares, forward and forward + backward: 1 is linear, 2 is quadratic."""
    exponents = []
    for direction in ("fwd", "fwdbwd"):
        points = [
            (log(sizes[2]), log(time))
            for sizes, threads in run.settings("cpu")
            if sizes[:2] == (1, 1536) and threads == 1 and (time := run.time(direction, "cpu", sizes, 1))
        ]
        if max((x for x, _ in points), default=0) >= log(65_536):
            exponents.append(_slope(points))
    return exponents


def _slope(points: list[tuple[float, float]]) -> float:
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _peak(run: Run) -> list[float]:
    return [
        row.median for row in run.rows if row.metric == "peak memory" and row.backend == "cpu" and row.pass_ == "fwdbwd"
    ]


def _errors(run: Run) -> list[float]:
    metrics = {row.metric for row in run.rows if row.metric.startswith("error of ")}
    cases = {
        ((row.batch, row.dim, row.seqlen), row.threads, row.pass_, row.variant)
        for row in run.rows
        if row.backend == "unbind loop"
    }
    return _divide(
        (
            run.median(direction, "cpu", sizes, threads, metric, variant),
            run.median(direction, "unbind loop", sizes, threads, metric, variant),
        )
        for sizes, threads, direction, variant in sorted(cases)
        for metric in sorted(metrics)
    )


def _step(above: tuple[str, str], below: tuple[str, str], seqlens: Iterable[Sizes], layers: int = 24):
    def ratios(run: Run) -> list[float]:
        places = [(sizes, threads) for sizes, threads in run.settings(above[0], below[0]) if sizes in seqlens]
        return _divide(
            tuple(
                run.median("fwdbwd", backend, *place, "wall time", f"{method} {layers} layers")
                for backend, method in (above, below)
            )
            for place in places
        )

    return ratios


def _step_over_gemm(*methods: str) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        found = [_step(("cpu", method), ("gemm", method), (SHORT_STEP, LONG_STEP))(run) for method in methods]
        found += [_step(("cpu", method), ("gemm", method), (BASE_STEP,), 8)(run) for method in methods]
        return [ratio for group in found for ratio in group]

    return ratios


def _step_memory(above: str, below: str) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        return _divide(
            tuple(
                run.median("fwdbwd", "cpu", *place, "peak memory", f"{method} 24 layers") for method in (above, below)
            )
            for place in run.settings("cpu")
        )

    return ratios


def _convolution(direction: str) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        return _divide(
            tuple(run.time(direction, backend, *place, "silu") for backend in ("torch", "cpu"))
            for place in run.main_settings("torch", "cpu")
        )

    return ratios


def _convolution_halves(run: Run) -> list[float]:
    return _divide(
        (run.time(direction, "cpu", *place, "silu bfloat16"), run.time(direction, "cpu", *place, "silu"))
        for direction in ("fwd", "fwdbwd")
        for place in run.main_settings("cpu")
    )


def _step_update(run: Run) -> list[float]:
    rows = {
        (row.backend, row.dim): row.median
        for row in run.rows
        if (row.metric, row.variant) == ("wall time", "default") and row.batch == 1
    }
    return _divide((rows[name, dim], rows.get(("cpu", dim))) for name, dim in sorted(rows) if name != "cpu")


def _throughput(run: Run) -> list[float]:
    rows = {(row.backend, row.batch): row.median for row in run.rows if row.metric == "throughput"}
    peers = [place for place in sorted(rows) if place[0] != "ssmtune"]
    return _divide((rows.get(("ssmtune", batch)), rows[name, batch]) for name, batch in peers)


def _on_gpu(run: Run, direction: str, backend: str, sizes: Sizes, variant: str = "") -> float | None:
    """Milliseconds of a scan in bfloat16, in the layout that suits its implementation."""
    tags = PEERS[backend].tags if backend in PEERS else ()
    return run.time(direction, backend, sizes, 0, " ".join((*tags, "bfloat16", *variant.split())))


def _gpu_sizes(run: Run, batch: int | None = None, dim: int | None = None) -> list[Sizes]:
    places = [sizes for sizes, threads in run.settings("mamba_ssm") if threads == 0]
    return [sizes for sizes in places if batch in (None, sizes[0]) and dim in (None, sizes[1])]


def _over_mamba_ssm(
    direction: str, backend: str, batch: int | None = None, dim: int | None = None, seqlen: int | None = None
) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        places = [sizes for sizes in _gpu_sizes(run, batch, dim) if seqlen in (None, sizes[2])]
        return _divide(
            (_on_gpu(run, direction, "mamba_ssm", sizes), _on_gpu(run, direction, backend, sizes)) for sizes in places
        )

    return ratios


def _over_bound(backend: str, sizes: Sizes) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        bounds = [
            row.median
            for row in run.rows
            if row.backend == "bound"
            and (row.pass_, row.variant) == ("fwd", "bfloat16")
            and (row.batch, row.dim, row.seqlen) == sizes
        ]
        return _divide([(_on_gpu(run, "fwd", backend, sizes), max(bounds))]) if bounds else []

    return ratios


def _gpu_offset(run: Run) -> list[float]:
    return _divide(
        (_on_gpu(run, way, backend, sizes, "state-offset"), _on_gpu(run, way, backend, sizes))
        for backend in ("triton", "cuda")
        for way in ("fwd", "fwdbwd")
        for sizes, threads in run.settings(backend)
        if threads == 0
    )


def _gpu_memory(backend: str) -> Callable[[Run], list[float]]:
    def ratios(run: Run) -> list[float]:
        peaks = {
            (row.backend, row.batch, row.dim, row.seqlen): row.median
            for row in run.rows
            if (row.metric, row.pass_, row.threads) == ("peak memory", "fwdbwd", 0)
        }
        places = [place[1:] for place in peaks if place[0] == "mamba_ssm"]
        return _divide((peaks.get((backend, *place)), peaks[("mamba_ssm", *place)]) for place in places)

    return ratios


def _gpu_step(above: tuple[str, str], below: tuple[str, str]) -> Callable[[Run], list[float]]:
    """Tokens per second of one implementation and method over those of another, for each model."""

    def ratios(run: Run) -> list[float]:
        rows = {
            (row.backend, *row.variant.split(maxsplit=1)): row.median
            for row in run.rows
            if (row.metric, row.threads) == ("throughput", 0)
        }
        layers = [key[2] for key in rows if key[:2] == below]
        return _divide((rows.get((*above, depth)), rows[(*below, depth)]) for depth in layers)

    return ratios


def _gpu_adapters(run: Run) -> list[float]:
    return _divide(
        tuple(run.time("fwd", backend, sizes, threads, f"{prefix}{tag}") for tag in ("64-adapters", "one-adapter"))
        for prefix in ("", "bfloat16 ")
        for backend in ("cpu", "triton", "cuda")
        for sizes, threads in run.settings(backend)
    )


SHORT_STEP: Sizes = (1, 768, 512)
LONG_STEP: Sizes = (4, 768, 512)
BASE_STEP: Sizes = (4, 256, 512)
GPU_STEP: Sizes = (8, 4096, 2048)
SCAN = "selective_scan"
STEP = "training_step"
CONV = "causal_conv1d"
UPDATE = "selective_state_update"
DECODING = "decoding"
OPS = (SCAN, STEP, CONV, UPDATE, DECODING)

BARS = (
    Bar(SCAN, "forward, against mambapy", _against("fwd", "mambapy"), at_least=50),
    Bar(SCAN, "forward, against PyTorch loops", _against("fwd", "unbind loop", "transformers"), at_least=50),
    Bar(SCAN, "forward, against plain C++ loops", _against("fwd", "plain C++"), at_least=4.5),
    Bar(SCAN, "forward + backward, against mambapy", _against("fwdbwd", "mambapy"), at_least=50),
    Bar(SCAN, "forward + backward, against the unbind loop", _against("fwdbwd", "unbind loop"), at_least=50),
    Bar(SCAN, "backward / forward", _backward_over_forward, at_most=2.2),
    Bar(SCAN, "two threads against one", _two_threads, at_least=1.8),
    Bar(SCAN, "channels-first / channels-last", _variant("channels-first", "fwd", "fwdbwd"), at_most=1.3),
    Bar(SCAN, "bfloat16 / float32", _variant("bfloat16", "fwd", "fwdbwd"), at_most=1.1),
    Bar(SCAN, "float16 / float32", _variant("float16", "fwd", "fwdbwd"), at_most=1.1),
    Bar(SCAN, "AVX2 / AVX-512", _variant("avx2", "fwd", "fwdbwd"), at_most=1.6),
    Bar(SCAN, "state offset / none, forward", _variant("state-offset", "fwd"), at_most=1.1),
    Bar(SCAN, "state offset / none, forward + backward", _variant("state-offset", "fwdbwd"), at_most=1.1),
    Bar(SCAN, "initial state / none, forward", _variant("initial-state", "fwd"), at_most=1.1),
    Bar(SCAN, "initial state / none, forward + backward", _variant("initial-state", "fwdbwd"), at_most=1.1),
    Bar(SCAN, "growth with seqlen, 512 to 65,536: exponent", _growth, at_most=1.05, unit=""),
    Bar(SCAN, "peak memory of forward + backward", _peak, at_most=5, unit=" tensors"),
    Bar(SCAN, "error against float64 / that of PyTorch in float32", _errors, at_most=4),
    Bar(SCAN, "all gradients / those of frozen weights", _variant("full", "fwdbwd")),
    Bar(
        SCAN,
        "only the offset's gradient / all with a state offset",
        _variant("offset-only", "bwd", base="state-offset"),
    ),
    Bar(STEP, "full step of 1 x 512, against mambapy", _step(("mambapy", "full"), ("cpu", "full"), (SHORT_STEP,)), 7),
    Bar(
        STEP,
        "full step of 4 x 512, 4 layers, against mambapy",
        _step(("mambapy", "full"), ("cpu", "full"), (LONG_STEP,), 4),
    ),
    Bar(
        STEP,
        "full step of 1 x 512, against the unbind loop",
        _step(("unbind loop", "full"), ("cpu", "full"), (SHORT_STEP,)),
    ),
    Bar(STEP, "step / its matrix products alone", _step_over_gemm("full", "state-offset"), at_most=1.25),
    Bar(STEP, "LoRA step / its matrix products alone", _step_over_gemm("lora")),
    Bar(
        STEP,
        "full step / state-offset step",
        _step(("cpu", "full"), ("cpu", "state-offset"), (SHORT_STEP, LONG_STEP)),
        at_least=1.35,
    ),
    Bar(
        STEP,
        "LoRA step / state-offset step",
        _step(("cpu", "lora"), ("cpu", "state-offset"), (SHORT_STEP, LONG_STEP)),
        at_least=1,
    ),
    Bar(STEP, "peak memory, full / state-offset", _step_memory("full", "state-offset"), at_least=1),
    Bar(STEP, "peak memory, LoRA / state-offset", _step_memory("lora", "state-offset"), at_least=1),
    Bar(CONV, "convolution with silu, forward, against torch", _convolution("fwd")),
    Bar(CONV, "convolution with silu, forward + backward, against torch", _convolution("fwdbwd"), at_least=10),
    Bar(CONV, "convolution in bfloat16 / float32", _convolution_halves, at_most=0.77),
    Bar(UPDATE, "one step of the recurrence, against transformers", _step_update, at_least=3),
    Bar(UPDATE, "one step, an adapter for each row / one for all", _gpu_adapters),
    Bar(DECODING, "tokens per second of mamba-5m, against transformers", _throughput),
    *(
        replace(bar, gpu=True)
        for bar in (
            Bar(SCAN, "Triton forward, against mamba_ssm", _over_mamba_ssm("fwd", "triton"), at_least=1.5),
            Bar(SCAN, "Triton backward, against mamba_ssm", _over_mamba_ssm("bwd", "triton"), at_least=1.5),
            Bar(SCAN, "Triton peak memory / that of mamba_ssm", _gpu_memory("triton"), at_most=0.5),
            Bar(SCAN, "CUDA forward / bound, 8 x 4096 x 2048", _over_bound("cuda", GPU_STEP), at_most=1.3),
            Bar(SCAN, "CUDA forward, 8 x 4096, against mamba_ssm", _over_mamba_ssm("fwd", "cuda", 8, 4096), at_least=2),
            Bar(SCAN, "CUDA backward, 8 x 4096, against mamba_ssm", _over_mamba_ssm("bwd", "cuda", 8, 4096), 1.8),
            Bar(
                SCAN,
                "CUDA forward + backward, 1 x 1536 x 16,384, against mamba_ssm",
                _over_mamba_ssm("fwdbwd", "cuda", 1, 1536, 16_384),
                at_least=3,
            ),
            Bar(SCAN, "CUDA peak memory / that of mamba_ssm", _gpu_memory("cuda")),
            Bar(SCAN, "GPU: state offset / none", _gpu_offset, at_most=1.03),
            Bar(
                STEP,
                "GPU: full step, tokens/s over transformers on mamba_ssm",
                _gpu_step(("ssmtune", "full"), ("transformers", "full")),
            ),
            Bar(
                STEP,
                "GPU: LoRA step, tokens/s over transformers on mamba_ssm",
                _gpu_step(("ssmtune", "lora"), ("transformers", "lora")),
            ),
            *(
                Bar(
                    STEP,
                    f"GPU: {method} step, tokens/s over its authors' way",
                    _gpu_step(("ssmtune", method), ("authors", method)),
                )
                for method in ("state-offset", "initial-state")
            ),
        )
    ),
)


def judge(rows: Iterable[Row], kept: bool = False) -> list[tuple[Bar, list[float]]]:
    """Each bar with its ratios in the last run of its operator, with memory kept between calls or without."""
    rows = list(rows)
    runs = {op: Run(latest(rows, op), kept) for op in OPS}
    return [(bar, bar.ratios(runs[bar.op])) for bar in BARS]

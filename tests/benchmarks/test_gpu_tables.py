"""Tables, bars and the picture of a GPU, from rows that are made up."""

import pytest

from benchmarks import tables
from benchmarks.bars import SCAN, STEP, judge
from ssmtune.measure import picture, results
from ssmtune.measure.inputs import Shape
from ssmtune.measure.scan_cases import ScanSpec
from ssmtune.measure.table import comparison

ENVIRONMENT = results.Environment("Test GPU", "2.11.0, driver 1.2", "0.1.0", "abc1234", "2026-01-02T03:04:05+00:00")
TRAINING = Shape(8, 4096, 2048)
LONG = Shape(1, 1536, 16_384)


def row(value, backend, direction="fwd", shape=TRAINING, tags=("bfloat16",), metric="gpu time", unit="ms"):
    if backend == "mamba_ssm":
        tags = ("channels-first", *tags)
    columns = ScanSpec(shape, direction, backend, tags, "cuda").columns
    return ENVIRONMENT.row(value, **columns, threads=0, metric=metric, unit=unit)


def step(rate, backend, method, metric="throughput"):
    return ENVIRONMENT.row(
        rate, op=STEP, pass_="step", backend=backend, dtype="bfloat16", batch=8, dim=768, seqlen=2048, dstate=16,
        threads=0, variant=f"{method} 24 layers", metric=metric, unit="tokens/s",
    )  # fmt: skip


def rows():
    found = []
    for backend, fwd, bwd in (("triton", 0.5, 2.0), ("cuda", 0.4, 1.5), ("mamba_ssm", 1.0, 3.0)):
        for shape in (TRAINING, LONG):
            found += [row(fwd, backend, "fwd", shape), row(bwd, backend, "bwd", shape)]
            found.append(row(fwd + bwd, backend, "fwdbwd", shape))
    found += [row(0.36, "bound", metric="least time by ex2"), row(0.2, "bound", metric="least time by memory")]
    found += [row(0.41, "cuda", tags=("bfloat16", "state-offset"))]
    peaks = {"triton": 2.0, "cuda": 2.5, "mamba_ssm": 4.5}
    found += [row(value, name, "fwdbwd", metric="peak memory", unit="tensors") for name, value in peaks.items()]
    found.append(row(4300.0, "copy", shape=Shape(0, 0, 0, 0), tags=(), metric="limit", unit="GB/s"))
    found += [step(3e5, "ssmtune", "state-offset"), step(1e5, "authors", "state-offset")]
    return [*found, step(1.0, "authors", "initial-state", "out of memory"), step(2e5, "ssmtune", "initial-state")]


@pytest.mark.parametrize(
    ("title", "holds", "ratios"),
    [
        ("Triton forward, against mamba_ssm", True, [2.0, 2.0]),
        ("Triton backward, against mamba_ssm", True, [1.5, 1.5]),
        ("Triton peak memory / that of mamba_ssm", True, [2 / 4.5]),
        ("CUDA forward / bound, 8 x 4096 x 2048", True, [0.4 / 0.36]),
        ("CUDA forward, 8 x 4096, against mamba_ssm", True, [2.5]),
        ("CUDA backward, 8 x 4096, against mamba_ssm", True, [2.0]),
        ("CUDA forward + backward, 1 x 1536 x 16,384, against mamba_ssm", False, [4 / 1.9]),
        ("GPU: state offset / none", True, [0.41 / 0.4]),
        ("GPU: state-offset step, tokens/s over its authors' way", None, [3.0]),
        ("GPU: initial-state step, tokens/s over its authors' way", None, []),
    ],
)
def test_bars_of_a_gpu(title, holds, ratios):
    bar, found = next((bar, found) for bar, found in judge(rows()) if bar.title == title)
    assert bar.gpu
    assert found == pytest.approx(ratios)
    if holds is not None:
        assert bar.holds(found) is holds


def test_bars_of_a_cpu_find_nothing_in_the_rows_of_a_gpu():
    assert [bar.title for bar, ratios in judge(rows()) if ratios and not bar.gpu] == []


def test_section_of_a_gpu_has_its_own_tables(tmp_path):
    path = tmp_path / "gpu.csv"
    results.append(path, rows())
    text = tables.section(path)
    assert "allocator as it comes" not in text and "against mambapy" not in text
    assert "| CUDA forward, 8 x 4096, against mamba_ssm | >= 2x | 2.5, holds |" in text
    assert "**2.11, missed**" in text
    assert "Limits, measured in this run: copy 4,300 GB/s" in text
    assert "| forward | (8, 4096, 2048) | bfloat16 |  | 0.5 | 0.4 | 1 (2.5x) | 0.36 ex2 (1.11x) |" in text
    assert "| forward + backward | (8, 4096, 2048) | 2 | 2.5 | 4.5 |" in text
    assert "| initial-state 24 layers, width 768 | authors |  | out of memory |" in text
    assert "`python -m benchmarks.gpu_kernels`: Test GPU, torch 2.11.0, driver 1.2" in text


def test_comparison_takes_the_larger_bound_and_the_faster_kernel():
    header, body = comparison(rows(), SCAN)
    assert header == ["pass", "batch, dim, seqlen", "dtype", "with", "triton", "cuda", "mamba_ssm", "least, ms"]
    plain = body[0]
    assert plain[-1] == "0.36 ex2 (1.11x)" and plain[-2] == "1 (2.5x)"
    assert any(line[3] == "state-offset" and line[5] == "0.41" for line in body)


def test_picture_of_a_gpu_has_a_line_for_each_kernel_and_the_bound(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    shapes = [Shape(1, 1536, 2**power) for power in (9, 10, 11)]
    found = [row(0.1 * k, name, "fwd", shape) for name in ("triton", "mamba_ssm") for k, shape in enumerate(shapes, 1)]
    found += [row(0.05, "bound", "fwd", shape, metric="least time by memory") for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
        picture.draw(found, tmp_path / "a.png")
    labels = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert set(labels) == {"triton", "mamba_ssm", "bound of the machine"}


def test_picture_without_lengths_says_what_to_run(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="ssmtune bench"):
        picture.draw([row(1.0, "cuda")], tmp_path / "a.png")

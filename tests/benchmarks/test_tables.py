import pytest

from benchmarks import tables
from benchmarks.bars import BARS, SCAN, STEP, Run, judge
from benchmarks.stored import FOLDER
from ssmtune.measure import picture, results
from ssmtune.measure.timing import Summary

ENVIRONMENT = results.Environment("Test CPU", "2.13.0", "0.1.0", "abc1234", "2026-01-02T03:04:05+00:00")
SHAPE = {"dtype": "float32", "batch": 1, "dim": 1536, "seqlen": 512, "dstate": 16}


def time_row(
    value, direction="fwd", backend="cpu", threads=1, variant="default", op=SCAN, environment=ENVIRONMENT, **sizes
):
    metric = "cpu time" if threads == 1 else "wall time"
    columns = {**SHAPE, **sizes, "op": op, "pass_": direction, "backend": backend, "threads": threads}
    return environment.row(Summary(value, value, value), variant=variant, metric=metric, unit="ms", **columns)


def ratios_of(title, rows, kept=False):
    return next((bar.holds(ratios), ratios) for bar, ratios in judge(rows, kept) if bar.title == title)


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    rows = [time_row(1.5), time_row(2.25, "fwdbwd", "plain C++", variant="channels-first")]
    results.append(path, rows[:1])
    results.append(path, rows[1:])
    assert results.read(path) == rows
    assert path.read_text().count("timestamp") == 1


def test_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="Name another file"):
        results.append(path, [time_row(1.0)])
    with pytest.raises(ValueError, match="has the columns a, b"):
        results.read(path)


def test_latest_takes_one_run_of_one_operator():
    later = results.Environment("Test CPU", "2.13.0", "0.1.0", "def5678", "2026-02-02T03:04:05+00:00")
    rows = [time_row(1.0), time_row(2.0, environment=later), time_row(3.0, op=STEP)]
    assert [row.median for row in results.latest(rows, SCAN)] == [2.0]
    assert [row.median for row in results.latest(rows, STEP)] == [3.0]
    assert results.latest([], SCAN) == []


@pytest.mark.parametrize(("peer", "holds"), [(60.0, True), (50.0, True), (49.9, False)])
def test_bar_against_mambapy(peer, holds):
    rows = [time_row(1.0), time_row(peer, backend="mambapy")]
    assert ratios_of("forward, against mambapy", rows) == (holds, [pytest.approx(peer)])


def test_bar_takes_the_worst_of_all_shapes():
    rows = [time_row(1.0), time_row(60.0, backend="mambapy")]
    rows += [time_row(1.0, batch=4), time_row(40.0, backend="mambapy", batch=4)]
    assert ratios_of("forward, against mambapy", rows)[0] is False


def test_bar_of_plain_cpp_compares_each_in_its_own_layout():
    rows = [time_row(2.0), time_row(3.0, variant="channels-first")]
    rows.append(time_row(10.0, backend="plain C++", variant="channels-first"))
    assert ratios_of("forward, against plain C++ loops", rows) == (True, [5.0])


@pytest.mark.parametrize(("power", "holds"), [(1.0, True), (2.0, False)])
def test_growth_tells_linear_from_quadratic(power, holds):
    rows = [
        time_row(1e-3 * length**power, direction, seqlen=length)
        for length in (512, 4096, 65_536)
        for direction in ("fwd", "fwdbwd")
    ]
    assert ratios_of("growth with seqlen, 512 to 65,536: exponent", rows) == (holds, [pytest.approx(power)] * 2)


def test_growth_needs_the_longest_sequence():
    assert ratios_of("growth with seqlen, 512 to 65,536: exponent", [time_row(1.0)]) == (None, [])


def test_error_is_compared_result_by_result():
    def row(backend, metric, value):
        columns = {**SHAPE, "op": SCAN, "pass_": "fwdbwd", "backend": backend, "threads": 2, "variant": "default"}
        return ENVIRONMENT.row(value, metric=metric, unit="1", **columns)

    rows = [row("cpu", "error of out", 3e-7), row("unbind loop", "error of out", 1e-7)]
    rows += [row("cpu", "error of B", 5e-7), row("unbind loop", "error of B", 1e-7)]
    holds, ratios = ratios_of("error against float64 / that of PyTorch in float32", rows)
    assert holds is False
    assert sorted(ratios) == pytest.approx([3, 5])


def test_every_bar_can_be_judged_with_nothing_measured():
    assert all(ratios == [] and bar.holds(ratios) is None for bar, ratios in judge([]))
    assert len(judge([])) == len(BARS)


def test_memory_kept_is_judged_apart():
    rows = [time_row(1.0), time_row(1.5, variant="channels-first")]
    rows += [time_row(2.0, variant="memory-kept"), time_row(2.2, variant="channels-first memory-kept")]
    title = "channels-first / channels-last"
    assert ratios_of(title, rows) == (False, [1.5])
    assert ratios_of(title, rows, kept=True) == (True, [pytest.approx(1.1)])


def step_rows():
    step = {"op": STEP, "dim": 768, "direction": "fwdbwd", "threads": 2}
    return [
        time_row(1000.0, backend="cpu", variant="full 24 layers", **step),
        time_row(700.0, backend="gemm", variant="full 24 layers", **step),
        time_row(4000.0, backend="mambapy", variant="full 24 layers", **step),
    ]


def test_bars_of_the_step():
    assert ratios_of("step / its matrix products alone", step_rows()) == (False, [pytest.approx(1.4286, abs=1e-3)])
    assert ratios_of("full step of 1 x 512, against mambapy", step_rows()) == (False, [4.0])


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    return path


def test_tables_are_rewritten_between_the_markers_and_show_misses(tmp_path, readme):
    rows = [time_row(1.0), time_row(40.0, backend="mambapy"), time_row(2.0, "bwd"), time_row(3.0, "fwdbwd")]
    rows.append(time_row(3.1, "fwdbwd", variant="full"))
    rows += [time_row(0.5, variant="memory-kept"), time_row(30.0, backend="mambapy", variant="memory-kept")]
    results.append(tmp_path / "results" / "cpu.csv", rows + step_rows())
    tables.rewrite(readme, tmp_path / "results")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "| forward, against mambapy | >= 50x | **40, missed** | 60, holds |" in text
    assert "| backward / forward | <= 2.2x | 2, holds |  |" in text
    assert "| AVX2 / AVX-512 | <= 1.6x |  |  |" in text
    assert "| forward | (1, 1536, 512) | 1 | 1 | 40 |" in text
    assert "Test CPU, torch 2.13.0, ssmtune 0.1.0 (abc1234), 2026-01-02" in text
    tables.rewrite(readme, tmp_path / "results")
    assert readme.read_text() == text


def test_tables_without_results_or_markers(tmp_path, readme):
    tables.rewrite(readme, tmp_path / "results")
    assert "Nothing measured yet." in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="no place for the tables"):
        tables.rewrite(readme, tmp_path)


def test_readme_of_the_benchmarks_has_the_tables_of_the_stored_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(tables.README.read_text())
    tables.rewrite(copy, FOLDER)
    assert copy.read_text() == tables.README.read_text(), "run python -m benchmarks.tables"


def test_readmes_say_which_gpus_were_measured():
    rows = [row for path in FOLDER.glob("*.csv") for row in results.read(path)]
    gpus = {row.device for row in rows if row.threads == 0}
    main = tables.README.parents[1] / "README.md"
    for path, nothing in ((main, "measured on a GPU yet"), (tables.README, "No GPU has been measured yet")):
        text = " ".join(path.read_text().split())
        assert (nothing in text) == (not gpus), path
        assert all(gpu in text for gpu in gpus), path


def test_plot_is_drawn_from_the_file(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [time_row(1.0, seqlen=length) for length in (512, 1024, 2048)]
    picture.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_run_knows_where_all_of_some_backends_were_timed():
    run = Run([time_row(1.0), time_row(1.0, batch=4), time_row(9.0, backend="mambapy")])
    assert run.settings("cpu") == [((1, 1536, 512), 1), ((4, 1536, 512), 1)]
    assert run.settings("cpu", "mambapy") == [((1, 1536, 512), 1)]
    assert run.time("fwd", "cpu", (2, 2, 2), 1) is None

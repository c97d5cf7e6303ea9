import io
import re
import struct
from html.parser import HTMLParser

import pytest

from ssmtune import plots
from ssmtune.report import interval_text, mean_text, print_report, with_interval, write_report
from ssmtune.summary import Spread, summarize

METHODS = {
    "full": [70, 72, 69],
    "lora": [60, 62, 67],
    "state-offset": [61, 64, 70],
    "initial-state": [50, 52, 55],
    "prompt-tuning": [30, 31, 32],
    "state-offset-y": [40, 44, 46],
}


class Page(HTMLParser):
    """Collects the tags that are open at the end, and every address."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_numbers_are_written_with_their_spread():
    spread = Spread((60.0, 62.0, 67.0))
    assert mean_text(spread) == "63.0 ± 3.6"
    assert interval_text(spread) == "[54.0, 72.0]"
    assert with_interval(Spread((1.0, 2.0, 3.0)), signed=True) == "+2.00 ± 2.48"
    assert (mean_text(Spread((5.0,))), interval_text(Spread((5.0,))), mean_text(None)) == ("5.00", "", "")


def test_write_report_writes_every_form(fake):
    out = fake(METHODS, base=12.5)
    report = write_report(out)
    text = report.markdown.read_text()
    assert "| LORA | 63.0 ± 3.6 | [54.0, 72.0] |" in text
    assert re.search(r"\| \*\*FULL\*\* \| \*\*70\.3 ± 1\.5\*\*", text)
    assert "| Base model, not tuned | 12.5 |" in text
    for condition in (
        "100 steps of 16 examples (2.0 passes",
        "times 0.333, 1, 3, 30 steps each with 1 seed",
        "800 to train on, 64 dev, 256 test",
        "Guessing gives 12.5 %",
        "torch 2 (abc)",
        "a machine, 2 threads",
    ):
        assert condition in text, condition
    assert "LORA: 1.0e-01: 2.2000, **3.0e-01: 2.0000**, 9.0e-01: 2.6000" in text
    lines = report.table.read_text().splitlines()
    assert lines[0].startswith("task,method,run,metric,value,lr,trainable")
    assert any(line.startswith("made-up,lora,1,accuracy,62,0.3,80000") for line in lines)
    assert len(lines) == 1 + 1 + 2 * 18


def test_html_needs_nothing_from_outside(fake):
    report = write_report(fake(METHODS))
    page = Page(report.html.read_text())
    assert page.open == []
    assert len(page.addresses) == 4 and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "prefers-color-scheme: dark" in report.html.read_text()


def test_pictures_are_drawn(fake):
    report = write_report(fake(METHODS))
    assert [picture.name for picture in report.pictures] == ["made-up-quality.png", "made-up-learning.png"]
    for picture in report.pictures:
        content = picture.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 1000 and height > 600


def test_failures_and_failed_checks_are_reported(fake):
    check = {"name": "gradients", "passed": False, "detail": "2 of 4 trainable tensors received no gradient"}
    out = fake({"lora": [60, 62]}, failed=["full"], checks=[check])
    report = write_report(out)
    text = report.markdown.read_text()
    assert "| FULL | failed |" in text and "- FULL: run failed: full <broke>" in text
    assert "61.0 ± 1.4 !" in text and "- LORA: check of gradients: 2 of 4 trainable" in text
    page = report.html.read_text()
    assert "<td class='failed'>failed</td>" in page and "full &lt;broke&gt;" in page and "<broke>" not in page
    assert Page(page).open == []


def test_without_matplotlib_the_report_says_how_to_get_it(fake, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    report = write_report(fake(METHODS))
    assert report.pictures == []
    assert plots.MISSING in report.markdown.read_text() and "pip install" in report.html.read_text()
    stream = io.StringIO()
    print_report(report, stream)
    assert plots.MISSING in stream.getvalue()


def test_a_comparison_that_has_only_begun_has_a_report(fake):
    report = write_report(fake({"lora": []}))
    assert report.pictures == [] and "| LORA | not run yet |" in report.markdown.read_text()


def test_print_report_is_plain_text_where_it_is_no_terminal(fake):
    stream = io.StringIO()
    print_report(write_report(fake(METHODS)), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["LORA"])
    assert row.split()[:4] == ["LORA", "63.0", "±", "3.6"] and "80,000" in row
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_labels_do_not_overlap(fake, theme, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figures = []
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or b"")
    scores = {name: [50 + i / 50, 50 - i / 50] for i, name in enumerate(METHODS)}
    task = summarize(fake(scores)).tasks[0]
    plots.quality_picture(task, theme)
    plots.learning_picture(task, theme)
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [text for text in figure.axes[0].texts if text.get_text().isupper()]
        # that of the annotation itself includes its line
        boxes = [Text.get_window_extent(text, renderer) for text in texts]
        assert len(boxes) == 6
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])

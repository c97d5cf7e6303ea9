import base64
import hashlib
import io
import json
import math
import re
import struct
from html.parser import HTMLParser

import pytest

from ssmtune.config import ConfigError
from ssmtune.report import pictures, print_report, write_report
from ssmtune.report.table import Column, interval_text, mean_text, merged, with_interval
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
    """Collects the tags that are open at the end, every address, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href", "action")]

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
    assert lines[0].startswith("model,task,method,run,metric,value,lr,trainable")
    assert any(line.startswith("mamba-5m,made-up,lora,1,accuracy,62,0.3,80000") for line in lines)
    assert len(lines) == 1 + 1 + 2 * 18


def test_html_needs_nothing_from_outside(fake):
    text = write_report(fake(METHODS)).html.read_text()
    page = Page(text)
    assert page.open == [] and page.addresses == [] and not {"link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in text and "unsafe" not in text
    assert not re.search(r"\beval\b|\bFunction\(|innerHTML|insertAdjacentHTML|document\.write", text)
    # the policy names the very style and script that the page has
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text


def test_no_name_becomes_markup(fake):
    out = fake({"lora": [60, 62]}, failed=["full"])
    description = json.loads((out / "comparison.json").read_text())
    name = description["methods"]["lora"]["title"] = "a</script><img src=x onerror=alert(1)>'\"&<!--"
    (out / "comparison.json").write_text(json.dumps(description))
    text = write_report(out).html.read_text()
    page = Page(text)
    assert page.open == [] and page.tags.count("script") == 2 and "img" not in page.tags
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["rows"][1]["title"] == name


def test_infinite_perplexities_leave_the_page_its_data(fake):
    out = fake({"lora": [3.5, 4.0], "full": [math.inf, 9.0]}, metric="perplexity", higher=False)
    text = write_report(out).html.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1], parse_constant=pytest.fail)
    assert data["rows"][1]["values"]["perplexity"] == 3.75 and "perplexity" not in data["rows"][2]["values"]


def test_several_comparisons_are_one_report(fake, tmp_path):
    first = fake(METHODS)
    second = tmp_path / "second"
    first.rename(second)
    description = json.loads((second / "comparison.json").read_text())
    description["config"]["model"] = "models/gpt"
    (second / "comparison.json").write_text(json.dumps(description))
    first = fake({"lora": [50, 51, 52]})
    with pytest.raises(ConfigError, match="2 comparisons make one report.\n  Say where to write it with --out"):
        write_report([first, second])
    report = write_report([first, second], tmp_path / "both")
    assert [study.name for study in report.studies] == ["mamba-5m", "gpt"]
    text = report.markdown.read_text()
    assert "### made-up: mamba-5m" in text and "### made-up: gpt" in text
    assert (
        tmp_path / "both/pictures/gpt-made-up-quality.png"
    ).is_file() and "(pictures/gpt-made-up-quality.png)" in text
    models = {line.split(",")[0] for line in report.table.read_text().splitlines()[1:]}
    assert models == {"mamba-5m", "gpt"}
    # of one model, they have the names of their directories
    report = write_report([first, first], tmp_path / "twice")
    assert [study.name for study in report.studies] == [str(first)] * 2


def test_merged_columns_keep_the_order_of_each_table():
    tables = [[Column(header, str) for header in headers.split()] for headers in ("a b d", "a c d", "x d e")]
    assert merged(tables) == ["x", "a", "c", "b", "d", "e"]


def test_pictures_are_drawn(fake):
    report = write_report(fake(METHODS))
    assert [picture.name for picture in report.pictures] == [
        "made-up-quality.png",
        "made-up-learning.png",
        "made-up-differences.png",
    ]
    for picture in report.pictures:
        content = picture.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 1000 and height > 400


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
    monkeypatch.setattr(pictures, "available", lambda: False)
    report = write_report(fake(METHODS))
    assert report.pictures == []
    assert pictures.MISSING in report.markdown.read_text()
    stream = io.StringIO()
    print_report(report, stream)
    assert pictures.MISSING in stream.getvalue()


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


def test_labels_do_not_overlap(fake, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figures = []
    monkeypatch.setattr(pictures, "_png", lambda figure: figures.append(figure) or b"")
    scores = {name: [50 + i / 50, 50 - i / 50] for i, name in enumerate(METHODS)}
    task = summarize(fake(scores)).tasks[0]
    pictures.quality_picture(task)
    pictures.learning_picture(task)
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [text for text in figure.axes[0].texts if text.get_text().isupper()]
        # that of the annotation itself includes its line
        boxes = [Text.get_window_extent(text, renderer) for text in texts]
        assert len(boxes) == 6
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])

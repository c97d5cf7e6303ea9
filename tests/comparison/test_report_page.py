"""The page of a report in a browser: what a reader does with it, done by a script put into a copy of the page."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from ssmtune.report import pictures, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
METHODS = {"full": [70, 72, 69], "lora": [60, 62, 67], "prompt-tuning": [9, 31, 32], "state-offset-y": [100, 44, 46]}
SEEN = """
const visible = () => [...document.querySelectorAll("tbody tr")].filter((line) => !line.hidden);
const methods = () => visible().map((line) => line.cells[2].textContent);
const head = (name) => [...document.querySelectorAll("th")].find((cell) => cell.textContent === name);
const pick = (name, value) => {
  const box = document.querySelector(`select[aria-label=${name}]`);
  box.value = value;
  box.dispatchEvent(new Event("change"));
};
const labels = (n) => [...document.querySelectorAll("#charts section")[n].querySelectorAll(".series")]
  .map((group) => group.querySelector("title").textContent);
"""


@pytest.fixture
def browse(tmp_path):
    """browse(page, script, width) opens a page from its file, and returns what `script` returns there."""

    def run(page, script, width=1280):
        own = f'{SEEN}document.body.append(Object.assign(document.createElement("pre"), {{ id: "seen", textContent: '
        own += f"JSON.stringify((() => {{ {script} }})()) }}));"
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        text = page.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        copy = tmp_path / "seen.html"
        copy.write_text(text.replace("</body>", f"<script>{own}</script></body>"))
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--window-size={width},900",
        ]
        arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run([BROWSER, *arguments, copy.as_uri()], capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        return json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1]))

    return run


@pytest.fixture
def page(fake, tmp_path, monkeypatch):
    """A report of two models, the second with fewer methods, one of which failed."""
    monkeypatch.setattr(pictures, "available", lambda: False)
    first = fake(METHODS)
    description = json.loads((first / "comparison.json").read_text())
    description["config"]["model"] = "gpt"
    (first / "comparison.json").write_text(json.dumps(description))
    second = first.rename(tmp_path / "gpt")
    first = fake({"lora": [50, 51, 52], "state-offset": [55, 51, 59]}, failed=["full"])
    return write_report([first, second], tmp_path / "both").html


def test_page_opens_without_a_request_and_draws_every_chart(page, browse):
    seen = browse(
        page,
        """return {requests: performance.getEntriesByType("resource").length, rows: visible().length,
          titles: [...document.querySelectorAll("#charts h2")].map((head) => head.textContent),
          charts: document.querySelectorAll("svg").length,
          tradeOff: labels(0), curves: labels(1), differences: labels(2),
          broken: /NaN|Infinity|undefined/.test(document.getElementById("charts").outerHTML)};""",
    )
    assert seen["requests"] == 0 and seen["rows"] == 9 and not seen["broken"]
    assert seen["titles"] == ["Trade-offs", "Learning curves", "Paired differences"] and seen["charts"] == 4
    assert "LORA · mamba-5m: 80 k, 51" in seen["tradeOff"] and len(seen["tradeOff"]) == 6
    assert seen["curves"] == ["LORA", "STATE-OFFSET", "FULL", "LORA", "PROMPT-TUNING", "STATE-OFFSET-Y"]
    assert "STATE-OFFSET · mamba-5m: 4 ± 8.96" in seen["differences"] and len(seen["differences"]) == 4


def test_a_click_on_a_header_sorts_by_numbers_and_leaves_empty_cells_last(page, browse):
    rising, falling, by_name = browse(
        page,
        """pick("model", "gpt");
          const click = (name) => { head(name).click(); return methods(); };
          return [click("accuracy %"), click("accuracy %"), click("method")];""",
    )
    order = ["PROMPT-TUNING", "LORA", "STATE-OFFSET-Y", "FULL"]
    # the base has 20, prompt tuning 24, and 63.0 of LORA is below 63.3
    assert rising == ["Base model, not tuned", *order]
    assert falling == [*order[::-1], "Base model, not tuned"]
    assert by_name == sorted(by_name)
    unscored = browse(
        page,
        """pick("model", "mamba-5m"); head("accuracy %").click(); head("lr").click();
      head("lr").click(); return methods();""",
    )
    assert set(unscored[2:]) == {"Base model, not tuned", "FULL"}


def test_filters_leave_rows_and_charts_of_what_was_chosen(page, browse):
    seen = browse(
        page,
        """pick("model", "mamba-5m"); pick("kind", "states");
          return {methods: methods(), tradeOff: labels(0), figures: document.querySelectorAll("figure").length,
            model: head("model").hidden, method: head("method").hidden};""",
    )
    assert seen["methods"] == ["LORA", "STATE-OFFSET", "FULL"]
    assert len(seen["tradeOff"]) == 2 and seen["figures"] == 3
    assert seen["model"] is True and seen["method"] is False


def test_axes_and_their_pareto_front_are_the_readers_choice(page, browse):
    fronts = browse(
        page,
        """pick("model", "gpt");
          const corners = () => document.querySelector(".front").getAttribute("d").split(/[ML]/).length - 1;
          const before = corners();
          pick("x", "headline metric"); pick("y", "trainable");
          const turned = corners();
          pick("x", "accuracy %"); pick("y", "accuracy %");
          return [before, turned, corners()];""",
    )
    # two methods and the corner between them; of one measure there is one best
    assert fronts == [3, 3, 1]


def test_page_fits_a_phone(page, browse):
    overflow, cut = browse(
        page,
        """document.body.style.width = "390px"; draw();
          const cut = [...document.querySelectorAll("#charts text")].filter((text) => {
            const [own, held] = [text, text.closest("figure")].map((node) => node.getBoundingClientRect());
            return own.left < held.left || own.right > held.right;
          });
          return [document.body.scrollWidth - document.body.clientWidth, cut.map((text) => text.textContent)];""",
        width=500,
    )
    assert overflow <= 0 and cut == []

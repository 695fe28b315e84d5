"""The page as people open it: in Chromium, from a file, without a network."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from report_sample import HOSTILE, hostile

from profiling.report.compare import compare, render_comparison
from profiling.report.html import render_html

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND")
"""Containers run as root, which Chromium's sandbox refuses; no name has an address."""
slow = pytest.mark.slow
FITTED = """Array.from(document.querySelectorAll('figure.chart'))
  .every(figure => figure.querySelector('svg').clientWidth === figure.clientWidth)"""
DRAWN = "document.documentElement.dataset.drawn !== undefined"
AXIS_COLOUR = "getComputedStyle(document.querySelector('#chart-waterfall .ytick text')).fill"
INK_LIGHT, INK_DARK = "rgb(21, 24, 29)", "rgb(233, 235, 239)"
ROWS = """Array.from(document.querySelectorAll('#chart-{} .ytick text')).map(text => {{
  const box = text.getBoundingClientRect();
  return [text.textContent, box.top, box.bottom];
}})"""


PANEL_3_LEGEND_4 = (".draglayer .xy3 .nsewdrag", "g.legend4 text")


class Tab:
    """A page of the browser, and what it complained of and asked the network for."""

    def __init__(self, context, path: Path, text: str):
        path.write_text(text, encoding="utf-8")
        self.page = context.new_page()
        self.errors, self.requests, own = [], [], path.resolve().as_uri()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "assert") and self.errors.append(said.text))
        self.page.on("request", lambda sent: sent.url.startswith((own, "data:")) or self.requests.append(sent.url))
        self.page.goto(own)
        self.wait_for(DRAWN)

    def evaluate(self, expression: str):
        return self.page.evaluate(expression)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()

    def wait_for(self, condition: str) -> None:
        """Return when a JavaScript condition holds. Playwright's own wait is an eval, which the policy forbids."""
        for _ in range(1_500):
            if self.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        pytest.fail(f"after 30 s still not: {condition}")

    def assert_whole(self, charts: int, widths=(1280, 360)) -> None:
        """Every chart is drawn without an error or a request, and fits at each of the widths."""
        assert self.count("figure.chart") == charts
        assert self.count("figure.chart[data-drawn] svg.main-svg") >= charts
        assert self.evaluate("document.documentElement.dataset.drawn") == str(charts)
        assert self.evaluate("document.documentElement.dataset.error || ''") == ""
        for width in widths:
            self.page.set_viewport_size({"width": width, "height": 800})
            self.wait_for(FITTED)
            assert self.evaluate("document.documentElement.scrollWidth") <= width
        assert (self.errors, self.requests) == ([], [])

    def assert_ticks_tell_values_apart(self) -> None:
        for chart in ("loss", "accuracy"):
            ticks = self.texts(f"#chart-{chart} .ytick text")
            assert len(set(ticks)) == len(ticks) > 1
            assert all(tick.endswith("%") == (chart == "accuracy") for tick in ticks)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    missing = "no playwright: pip install -e '.[test]'" if sync_playwright is None else "" if path else "no Chromium"
    if missing and os.environ.get("REQUIRE_CHROMIUM"):
        pytest.fail(f"{missing}, and REQUIRE_CHROMIUM is set: install it, or unset that variable")
    if missing:
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    return browser.new_context(viewport={"width": 1280, "height": 800})


def test_the_page_of_a_whole_run(context, tmp_path, whole):
    """Its points, its colours in light, dark and on paper, the provenance of its numbers, its width on a phone."""
    tab = Tab(context, tmp_path / "page.html", render_html(whole))
    rows = len({term["key"] for term in whole["terms"] + whole["article"]["terms"]}) + 1
    assert tab.count("#chart-waterfall .bars .point") == rows
    points = "#chart-roofline .points path"
    assert tab.count(points) == 3  # two kernels, and one of them by counted bytes
    tab.evaluate("document.querySelector('[data-choose=layers]').click()")
    assert tab.count(points) == len(whole["layers"])
    assert tab.evaluate("document.querySelector('[data-choose=layers]').ariaPressed") == "true"
    tab.evaluate("document.querySelector('[data-choose=kernels]').click()")
    assert tab.count(points) == 3
    for how in ("focus()", "click()"):  # by the keyboard, and by touch
        assert tab.evaluate("document.getElementById('tip').hidden")
        tab.evaluate(f"document.querySelectorAll('.tile')[4].{how}")
        assert not tab.evaluate("document.getElementById('tip').hidden")
        tip = tab.evaluate("document.getElementById('tip').textContent")
        assert tip == "test accuracy = 0.9407 share\nmeasured: test images, official data, n = 1"
        tab.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        tab.evaluate("document.activeElement.blur()")
    assert tab.evaluate(AXIS_COLOUR) == INK_LIGHT
    tab.page.emulate_media(color_scheme="dark")
    tab.wait_for(f"{AXIS_COLOUR} === '{INK_DARK}'")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(AXIS_COLOUR) == INK_LIGHT
    assert tab.evaluate("document.getElementById('chart-timeline').clientWidth") <= 700
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(AXIS_COLOUR) == INK_DARK
    assert tab.page.pdf().startswith(b"%PDF")
    assert tab.evaluate("document.documentElement.className") == ""
    tab.assert_whole(6)


def test_hostile_names_do_nothing(context, tmp_path, whole):
    tab = Tab(context, tmp_path / "page.html", render_html(hostile(whole)))
    tab.assert_whole(6, widths=(360,))
    assert tab.evaluate("document.documentElement.dataset.hacked || ''") == ""
    assert tab.count("main img, main b b, svg a, main link") == 0
    words = tab.texts("#chart-waterfall .ytick text")
    assert any(word.startswith(HOSTILE["script"][:30]) for word in words)


@slow
def test_the_page_of_a_bare_run(context, tmp_path, bare):
    Tab(context, tmp_path / "page.html", render_html(bare)).assert_whole(1)


def one_epoch(report: dict, accuracies: tuple[float, float]) -> str:
    """The page of a run of one epoch, in which training and test lie as far apart as `accuracies`."""
    values = dict(zip(("train_accuracy", "test_accuracy"), accuracies, strict=True))
    values |= {"train_loss": 2.3049, "test_loss": 2.3049 + accuracies[1] - accuracies[0]}
    return render_html(report | {"epochs": [report["epochs"][0] | values]})


def test_on_a_phone_the_labels_of_a_waterfall_are_whole_and_apart(browser, tmp_path, whole):
    phone = browser.new_context(viewport={"width": 400, "height": 800}, is_mobile=True)
    tab = Tab(phone, tmp_path / "page.html", one_epoch(whole, (0.1, 0.10005)))
    tab.wait_for(FITTED)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    for chart in ("waterfall", "article"):
        rows = sorted(tab.evaluate(ROWS.format(chart)), key=lambda row: row[1])
        assert len(rows) > 8
        assert not [text for text, _, _ in rows if "…" in text]
        for (above, _, bottom), (below, top, _) in itertools.pairwise(rows):
            assert bottom <= top, (above, below)
    panel, legend = (
        f"document.querySelector('#chart-timeline {of}').getBoundingClientRect()" for of in PANEL_3_LEGEND_4
    )
    assert tab.evaluate(f"{panel}.bottom <= {legend}.top"), "a legend lies on the panel above"
    names = "Array.from(document.querySelectorAll('table:not(.kernels) td.name > span'))"
    cut = f"{names}.filter(n => n.scrollWidth > n.clientWidth || n.clientHeight > 60).map(n => n.textContent)"
    assert tab.evaluate(cut) == []
    tab.assert_ticks_tell_values_apart()


@slow
@pytest.mark.parametrize("accuracies", [(0.1, 0.1), (0.1, 0.12), (0.93, 0.9407)], ids=str)
def test_the_ticks_of_one_epoch_tell_its_values_apart(context, tmp_path, whole, accuracies):
    Tab(context, tmp_path / "page.html", one_epoch(whole, accuracies)).assert_ticks_tell_values_apart()


def test_a_violation_of_the_policy_and_a_chart_that_cannot_be_drawn_are_seen(context, tmp_path, whole):
    """The other charts are drawn all the same."""
    page, loss = render_html(whole), '"key":"loss","title":"loss","height":280,"data":['
    for instead_of, by in (
        ("<header>", '<header><img src="http://example.invalid/x.png"><script>0</script>'),
        (loss, loss + '{"type":"bar","x":5},null,'),
    ):
        assert instead_of in page
        page = page.replace(instead_of, by, 1)
    tab = Tab(context, tmp_path / "page.html", page)
    assert len([error for error in tab.errors if "Content Security Policy" in error]) == 2
    assert tab.requests == ["http://example.invalid/x.png"]
    assert tab.evaluate("document.documentElement.dataset.drawn") == "5"
    assert "could not be drawn" in tab.page.locator("#chart-loss").text_content()
    assert tab.evaluate("document.documentElement.dataset.error") != ""


def test_a_comparison_is_drawn_without_an_error_or_a_request(context, tmp_path, reports):
    one, other = hostile(reports["whole"]), hostile(reports["whole"])
    for report in (one, other):
        report["run"]["status"] = "complete"
    other["terms"][3]["ns"] += 10**9
    other["run"]["ops"] = list(HOSTILE)
    Tab(context, tmp_path / "page.html", render_comparison(compare(one, other))).assert_whole(1)

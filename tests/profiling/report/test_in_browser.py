"""The page as people open it: in Chromium, from a file, without a network."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from report_sample import HOSTILE, cpu, empty, gpu, hostile

from profiling.report.compare import compare
from profiling.report.html import render_comparison, render_html

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND")
"""Containers run as root, which Chromium's sandbox refuses; no name has an address."""
CHARTS = {"gpu": 6, "cpu": 5, "empty": 0, "hostile": 6}
slow = pytest.mark.slow
PAGES = ["gpu", "hostile", pytest.param("cpu", marks=slow), pytest.param("empty", marks=slow)]
FITTED = """Array.from(document.querySelectorAll('figure.chart'))
  .every(figure => figure.querySelector('svg').clientWidth === figure.clientWidth)"""
DRAWN = "document.documentElement.dataset.drawn !== undefined"
AXIS_COLOUR = "getComputedStyle(document.querySelector('#chart-waterfall .ytick text')).fill"
INK_LIGHT, INK_DARK = "rgb(21, 24, 29)", "rgb(233, 235, 239)"


class Tab:
    """A page of the browser, and what it complained of and asked the network for."""

    def __init__(self, context, path: Path, condition: str = DRAWN):
        self.page = context.new_page()
        self.errors, self.requests, own = [], [], path.resolve().as_uri()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "assert") and self.errors.append(said.text))
        self.page.on("request", lambda sent: sent.url.startswith((own, "data:")) or self.requests.append(sent.url))
        self.page.goto(own)
        self.wait_for(condition)

    def evaluate(self, expression: str):
        return self.page.evaluate(expression)

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def wait_for(self, condition: str) -> None:
        """Return when a JavaScript condition holds. Playwright's own wait is an eval, which the policy forbids."""
        for _ in range(1_500):
            if self.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        pytest.fail(f"after 30 s still not: {condition}")

    def resize(self, width: int) -> None:
        self.page.set_viewport_size({"width": width, "height": 800})


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


@pytest.fixture(scope="module")
def phone(browser):
    return browser.new_context(viewport={"width": 400, "height": 800}, is_mobile=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for make in (gpu, cpu, empty, hostile):
        (folder / f"{make.__name__}.html").write_text(render_html(make()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def opened(context, folder):
    """A sample's page, opened once for all tests, in front, light and 1280 pixels wide."""
    tabs = {}

    def get(name: str) -> Tab:
        if name not in tabs:
            tabs[name] = Tab(context, folder / f"{name}.html")
        tabs[name].page.bring_to_front()  # a page behind another is told neither of a new size nor of new colours
        tabs[name].resize(1280)
        tabs[name].page.emulate_media(color_scheme="light")
        return tabs[name]

    return get


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_drawn_without_an_error_or_a_request(opened, name):
    tab = opened(name)
    assert tab.count("figure.chart") == CHARTS[name]
    assert tab.count("figure.chart[data-drawn] svg.main-svg") >= CHARTS[name]
    assert tab.evaluate("document.documentElement.dataset.drawn") == str(CHARTS[name])
    assert tab.evaluate("document.documentElement.dataset.error || ''") == ""
    for width in (1280, 360):
        tab.resize(width)
        tab.wait_for(FITTED)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (tab.errors, tab.requests) == ([], [])


def test_bars_and_points_are_those_of_the_report(opened):
    tab, report = opened("gpu"), gpu()
    rows = len({term["key"] for term in report["terms"] + report["article"]["terms"]}) + 1
    assert tab.count("#chart-waterfall .bars .point") == rows
    placed = sum(row["intensity"] is not None for row in report["kernels"])
    placed += sum(row.get("dram_bytes") is not None for row in report["kernels"])
    assert tab.count("#chart-roofline .points path") == placed
    tab.evaluate("document.querySelector('[data-choose=layers]').click()")
    assert tab.count("#chart-roofline .points path") == len(report["layers"])
    assert tab.evaluate("document.querySelector('[data-choose=layers]').ariaPressed") == "true"
    tab.evaluate("document.querySelector('[data-choose=kernels]').click()")
    assert tab.count("#chart-roofline .points path") == placed


def test_charts_follow_light_and_dark_and_paper_is_light(opened):
    tab = opened("gpu")
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


@pytest.mark.parametrize("how", ["focus()", "click()"], ids=["keyboard", "touch"])
def test_the_provenance_of_a_number_opens(opened, how):
    tab = opened("gpu")
    tab.evaluate("document.activeElement.blur()")
    assert tab.evaluate("document.getElementById('tip').hidden")
    tab.evaluate(f"document.querySelectorAll('.tile')[5].{how}")
    assert not tab.evaluate("document.getElementById('tip').hidden")
    tip = tab.evaluate("document.getElementById('tip').textContent")
    assert tip == "MFU = 0.501 share\nmeasured: FLOPs / (training x 989 TFLOP/s)"
    tab.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert tab.evaluate("document.getElementById('tip').hidden")


def test_hostile_words_do_nothing(opened):
    tab = opened("hostile")
    assert tab.evaluate("document.documentElement.dataset.hacked || ''") == ""
    assert tab.count("main img, main b b, svg a, main link") == 0
    words = tab.page.locator("#chart-waterfall .ytick text").all_text_contents()
    assert any(word.startswith(HOSTILE[0][:30]) and word.endswith("…") for word in words)


ROWS = """Array.from(document.querySelectorAll('#chart-{} .ytick text')).map(text => {{
  const box = text.getBoundingClientRect();
  return [text.textContent, box.top, box.bottom];
}})"""


def one_epoch(accuracies: tuple[float, float]) -> dict:
    """A report of a run of one epoch, in which training and test lie as far apart as `accuracies`."""
    values = dict(zip(("train_accuracy", "test_accuracy"), accuracies, strict=True))
    values |= {"train_loss": 2.3049, "test_loss": 2.3049 + accuracies[1] - accuracies[0]}
    return gpu() | {"epochs": [gpu()["epochs"][0] | values]}


def assert_ticks_tell_values_apart(tab: Tab) -> None:
    for chart in ("loss", "accuracy"):
        ticks = tab.page.locator(f"#chart-{chart} .ytick text").all_text_contents()
        assert len(set(ticks)) == len(ticks) > 1
        assert all(tick.endswith("%") == (chart == "accuracy") for tick in ticks)


@pytest.mark.parametrize("make", [lambda: one_epoch((0.1, 0.10005)), pytest.param(cpu, marks=slow)], ids=["gpu", "cpu"])
def test_on_a_phone_the_labels_of_a_waterfall_are_whole_and_apart(phone, tmp_path, make):
    (tmp_path / "page.html").write_text(render_html(make()))
    tab = Tab(phone, tmp_path / "page.html")
    tab.wait_for(FITTED)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    for chart in ("waterfall", "article"):
        rows = sorted(tab.evaluate(ROWS.format(chart)), key=lambda row: row[1])
        assert not [text for text, _, _ in rows if "…" in text]
        for (above, _, bottom), (below, top, _) in itertools.pairwise(rows):
            assert bottom <= top, (above, below)
    names = "Array.from(document.querySelectorAll('table:not(.kernels) td.name > span'))"
    cut = f"{names}.filter(n => n.scrollWidth > n.clientWidth || n.clientHeight > 60).map(n => n.textContent)"
    assert tab.evaluate(cut) == []
    assert_ticks_tell_values_apart(tab)


@slow
@pytest.mark.parametrize("accuracies", [(0.1, 0.1), (0.1, 0.10005), (0.1, 0.12), (0.93, 0.9407)], ids=str)
def test_the_ticks_of_one_epoch_tell_its_values_apart(context, tmp_path, accuracies):
    (tmp_path / "page.html").write_text(render_html(one_epoch(accuracies)))
    assert_ticks_tell_values_apart(Tab(context, tmp_path / "page.html"))


def test_a_violation_of_the_policy_and_a_chart_that_cannot_be_drawn_are_seen(context, folder):
    """The other charts are drawn all the same."""
    page = (folder / "gpu.html").read_text(encoding="utf-8")
    loss = '"key":"loss","title":"loss","height":280,"data":['
    for instead_of, by in (
        ("<header>", '<header><img src="http://example.invalid/x.png"><script>0</script>'),
        (loss, loss + '{"type":"bar","x":5},null,'),
    ):
        assert instead_of in page
        page = page.replace(instead_of, by, 1)
    (folder / "faulty.html").write_text(page, encoding="utf-8")
    tab = Tab(context, folder / "faulty.html")
    assert len([error for error in tab.errors if "Content Security Policy" in error]) == 2
    assert tab.requests == ["http://example.invalid/x.png"]
    assert tab.evaluate("document.documentElement.dataset.drawn") == "5"
    assert "could not be drawn" in tab.page.locator("#chart-loss").text_content()
    assert tab.evaluate("document.documentElement.dataset.error") != ""


def test_a_comparison_is_drawn_without_an_error_or_a_request(context, folder):
    one, other = gpu(), gpu()
    for report in (one, other):
        report["run"].update(status="complete")
    other["terms"][3]["ns"] += 10**9
    other["run"]["ops"] = HOSTILE
    path = folder / "comparison.html"
    path.write_text(render_comparison(compare(one, other)), encoding="utf-8")
    tab = Tab(context, path)
    assert tab.count("figure.chart svg") > 0
    assert tab.evaluate("document.documentElement.dataset.drawn") == "1"
    assert (tab.errors, tab.requests) == ([], [])

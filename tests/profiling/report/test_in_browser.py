"""The page as people open it: in Chromium, from a file, without a network."""

import itertools
import os
from pathlib import Path

import chromium
import pytest
from report_sample import HOSTILE, cpu, empty, gpu, hostile

from profiling.report.compare import compare
from profiling.report.html import render_comparison, render_html

CHARTS = {"gpu": 6, "cpu": 5, "empty": 0, "hostile": 6}
FITTED = (
    "Array.from(document.querySelectorAll('figure.chart'))"
    ".every(figure => figure.querySelector('svg').clientWidth === figure.clientWidth)"
)
DRAWN = "document.documentElement.dataset.drawn !== undefined"
AXIS_COLOUR = "getComputedStyle(document.querySelector('#chart-waterfall .ytick text')).fill"
INK_LIGHT, INK_DARK = "rgb(21, 24, 29)", "rgb(233, 235, 239)"


@pytest.fixture(scope="module")
def browser():
    path = chromium.find()
    if path is None:
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("no Chromium, and REQUIRE_CHROMIUM is set: install it, or unset that variable")
        pytest.skip("no Chromium")
    with chromium.Browser(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for make in (gpu, cpu, empty, hostile):
        (folder / f"{make.__name__}.html").write_text(render_html(make()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def opened(browser, folder):
    """A sample's page, opened once for all tests, back in the state in which it was opened."""
    pages = {}

    def get(name: str) -> chromium.Page:
        if name not in pages:
            pages[name] = chromium.Page(browser, folder / f"{name}.html")
            pages[name].wait_for(DRAWN)
        pages[name].show()
        pages[name].resize(1280)
        pages[name].media(dark=False)
        return pages[name]

    return get


def planted(folder: Path, what: str, instead_of: str, by: str) -> Path:
    """The page with something wrong in it."""
    page = (folder / "gpu.html").read_text(encoding="utf-8")
    assert instead_of in page
    path = folder / f"{what}.html"
    path.write_text(page.replace(instead_of, by, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_drawn_without_an_error_or_a_request(opened, name):
    page = opened(name)
    assert page.evaluate("document.querySelectorAll('figure.chart').length") == CHARTS[name]
    assert page.evaluate("document.querySelectorAll('figure.chart[data-drawn] svg.main-svg').length") >= CHARTS[name]
    assert page.evaluate("document.documentElement.dataset.drawn") == str(CHARTS[name])
    assert page.evaluate("document.documentElement.dataset.error || ''") == ""
    assert page.errors() == []
    assert page.requests() == []


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_window(opened, name, width):
    page = opened(name)
    page.resize(width)
    page.wait_for(FITTED)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_bars_and_points_are_those_of_the_report(opened):
    page, report = opened("gpu"), gpu()
    rows = len({term["key"] for term in report["terms"] + report["article"]["terms"]}) + 1
    assert page.evaluate("document.querySelectorAll('#chart-waterfall .bars .point').length") == rows
    placed = sum(row["intensity"] is not None for row in report["kernels"])
    placed += sum(row.get("dram_bytes") is not None for row in report["kernels"])
    assert page.evaluate("document.querySelectorAll('#chart-roofline .points path').length") == placed


def test_layers_take_the_place_of_kernels(opened):
    page = opened("gpu")
    page.evaluate("document.querySelector('[data-choose=layers]').click()")
    assert page.evaluate("document.querySelectorAll('#chart-roofline .points path').length") == len(gpu()["layers"])
    assert page.evaluate("document.querySelector('[data-choose=layers]').ariaPressed") == "true"
    page.evaluate("document.querySelector('[data-choose=kernels]').click()")
    assert page.evaluate("document.querySelectorAll('#chart-roofline .points path').length") > len(gpu()["layers"])


def test_charts_follow_light_and_dark_and_paper_is_light(opened):
    page = opened("gpu")
    assert page.evaluate(AXIS_COLOUR) == INK_LIGHT
    page.media(dark=True)
    page.wait_for(f"{AXIS_COLOUR} === '{INK_DARK}'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(AXIS_COLOUR) == INK_LIGHT
    assert page.evaluate("document.getElementById('chart-timeline').clientWidth") <= 700
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(AXIS_COLOUR) == INK_DARK


def test_it_prints(opened, tmp_path):
    page = opened("gpu")
    page.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert page.evaluate("document.documentElement.className") == ""


@pytest.mark.parametrize("how", ["focus()", "click()"], ids=["keyboard", "touch"])
def test_a_numbers_provenance_opens(opened, how):
    page = opened("gpu")
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate("document.getElementById('tip').hidden")
    page.evaluate(f"document.querySelectorAll('.tile')[5].{how}")
    assert not page.evaluate("document.getElementById('tip').hidden")
    tip = page.evaluate("document.getElementById('tip').textContent")
    assert tip == "MFU = 0.501 share\nmeasured: FLOPs / (training x 989 TFLOP/s)"
    page.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.evaluate("document.getElementById('tip').hidden")


def test_hostile_words_do_nothing(opened):
    page = opened("hostile")
    assert page.evaluate("document.documentElement.dataset.hacked || ''") == ""
    assert page.evaluate("document.querySelectorAll('main img, main b b, svg a, main link').length") == 0
    words = page.evaluate(
        "Array.from(document.querySelectorAll('#chart-waterfall .ytick text')).map(t => t.textContent)"
    )
    assert any(word.startswith(HOSTILE[0][:30]) and word.endswith("…") for word in words)


ROWS = """Array.from(document.querySelectorAll('#chart-{} .ytick text')).map(text => {{
  const box = text.getBoundingClientRect();
  return [text.textContent, box.top, box.bottom];
}})"""


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_on_a_phone_a_waterfalls_labels_are_whole_and_apart(opened, name):
    page = opened(name)
    page.resize(400)
    page.wait_for(FITTED)
    for chart in ("waterfall", "article"):
        rows = sorted(page.evaluate(ROWS.format(chart)), key=lambda row: row[1])
        assert not [text for text, _, _ in rows if "…" in text]
        for (above, _, bottom), (below, top, _) in itertools.pairwise(rows):
            assert bottom <= top, (above, below)
    names = "Array.from(document.querySelectorAll('table:not(.kernels) td.name > span'))"
    cut = f"{names}.filter(n => n.scrollWidth > n.clientWidth || n.clientHeight > 60).map(n => n.textContent)"
    assert page.evaluate(cut) == []


TICKS = "Array.from(document.querySelectorAll('#chart-{} .ytick text')).map(t => t.textContent)"


@pytest.mark.parametrize("accuracies", [(0.1, 0.1), (0.1, 0.10005), (0.1, 0.12), (0.93, 0.9407)], ids=str)
def test_the_ticks_of_one_epoch_tell_its_values_apart(browser, tmp_path, accuracies):
    values = dict(zip(("train_accuracy", "test_accuracy"), accuracies, strict=True))
    values |= {"train_loss": 2.3049, "test_loss": 2.3049 + accuracies[1] - accuracies[0]}
    (tmp_path / "page.html").write_text(render_html(gpu() | {"epochs": [gpu()["epochs"][0] | values]}))
    page = chromium.Page(browser, tmp_path / "page.html")
    page.wait_for(DRAWN)
    for chart in ("loss", "accuracy"):
        ticks = page.evaluate(TICKS.format(chart))
        assert len(set(ticks)) == len(ticks) > 1
        assert all(tick.endswith("%") == (chart == "accuracy") for tick in ticks)


def test_a_violation_of_the_policy_would_be_seen(browser, folder):
    path = planted(
        folder, "violation", "<header>", '<header><img src="http://example.invalid/x.png"><script>0</script>'
    )
    page = chromium.Page(browser, path)
    assert len([error for error in page.errors() if "Content Security Policy" in error]) == 2
    assert page.requests() == ["http://example.invalid/x.png"]


def test_a_chart_that_cannot_be_drawn_says_so_and_the_others_are_drawn(browser, folder):
    loss = '"key":"loss","title":"loss","height":280,"data":['
    page = chromium.Page(browser, planted(folder, "broken", loss, loss + '{"type":"bar","x":5},null,'))
    page.wait_for(DRAWN)
    assert page.evaluate("document.documentElement.dataset.drawn") == "5"
    assert "could not be drawn" in page.evaluate("document.getElementById('chart-loss').textContent")
    assert page.evaluate("document.documentElement.dataset.error") != ""


def test_a_comparison_is_drawn_without_an_error_or_a_request(browser, folder):
    one, other = gpu(), gpu()
    for report in (one, other):
        report["run"].update(status="complete")
    other["terms"][3]["ns"] += 10**9
    other["run"]["ops"] = HOSTILE
    path = folder / "comparison.html"
    path.write_text(render_comparison(compare(one, other)), encoding="utf-8")
    page = chromium.Page(browser, path)
    page.wait_for(DRAWN)
    assert page.evaluate("document.querySelectorAll('figure.chart svg').length") > 0
    assert page.evaluate("document.documentElement.dataset.drawn") == "1"
    assert page.errors() == []
    assert page.requests() == []

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from report_sample import HOSTILE, HOSTILE_IDS, cpu, empty, gpu, hostile

from profiling.report.charts import charts
from profiling.report.html import HERE, assets, data_warning, head, render_html
from profiling.report.markdown import render_markdown

SAMPLES = [gpu, cpu, empty, hostile]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Elements in their nesting, the text outside of scripts and styles, and titles."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.attributes, self.scripts, self.words, self.titles = [], [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.titles += [value for name, value in attributes if name == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages():
    return {make.__name__: render_html(make()) for make in SAMPLES}


@pytest.mark.parametrize("name", [make.__name__ for make in SAMPLES])
def test_every_element_is_closed_and_none_is_a_stranger(pages, name):
    page = Reader(pages[name])
    assert page.open == []
    assert {name for name, _ in page.attributes if name.startswith("on")} == set()
    assert set(page.elements) <= set(Reader(pages["gpu"]).elements) | set(Reader(pages["cpu"]).elements)
    assert page.elements.count("script") == 3
    assert page.elements.count("style") == page.elements.count("link") == 1


def test_a_page_is_as_large_as_its_charts_need_and_always_the_same(pages):
    assert max(len(page.encode()) for page in pages.values()) < 6e6
    assert len(pages["empty"]) < 1e5, "without a chart there is no plotly in it"
    assert render_html(hostile()) == pages["hostile"]


def test_it_refers_to_nothing_outside(pages):
    for name, value in Reader(pages["hostile"]).attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value == "data:," or value.startswith("#"), value
    assert not re.search(r"url\(|@import", (HERE / "report.css").read_text())


def test_only_its_own_scripts_may_run(pages):
    page = Reader(pages["gpu"])
    policy = next(value for name, value in page.attributes if name == "content" and "script-src" in value)
    assert policy.startswith("default-src 'none';")
    allowed = re.search(r"script-src ([^;]*)", policy)[1].split()
    _, plotly, script = page.scripts
    for text in (plotly, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in allowed
    assert len(allowed) == 2


@pytest.mark.parametrize("words", HOSTILE, ids=HOSTILE_IDS)
def test_the_data_cannot_end_its_script(words):
    report = gpu()
    report["terms"][0]["name"] = report["kernels"][0]["name"] = words
    data = str(assets(charts(report))["data"])
    assert not set("<>&\u2028\u2029\0") & set(data)
    assert next(chart["key"] for chart in json.loads(data)) == "waterfall"


def test_hostile_words_are_shown_as_they_are(pages):
    text = Reader(pages["hostile"]).text()
    assert HOSTILE[0] in text
    assert HOSTILE[1] in text
    assert "{{ 7 * 7 }}{% raw %}" in text
    assert "\0" not in pages["hostile"]
    assert "\u202e" not in pages["hostile"]


def test_the_page_says_what_the_report_says(pages):
    page = Reader(pages["gpu"])
    text = page.text()
    report = gpu()
    for words in (
        report["headline"],
        report["assumption"],
        *report["sentences"],
        "94.07",
        "\N{MINUS SIGN}0.014",
        "31.43",
    ):
        assert words in text, words
    for heading in ("From ideal to measured", "What to do next", "Phases", "Roofline", "Kernels", "Floors", "lacks"):
        assert heading in text
    assert "INCOMPLETE" not in text


def test_below_the_headline_stands_what_is_known_of_the_run():
    report = gpu()
    report["run"] |= {"date": None, "git_sha": "0123456789abcdef" * 2}
    names = dict(head(report))
    assert names["git sha"] == "0123456789ab"
    assert names["batch size"] == "512"
    assert "date" not in names


def test_sections_are_in_order(pages):
    ids = re.findall(r'<section id="(\w+)"', pages["gpu"])
    nav = re.search(r"<nav.*?</nav>", pages["gpu"])[0]
    named = re.findall(r'<section id="(\w+)">\s*<h2>(.*?)</h2>', pages["gpu"])
    assert re.findall(r'<a href="#(\w+)">(.*?)</a>', nav) == named
    assert [key for key, _ in named] == ids
    assert ids[:3] == ["account", "next", "phases"]


def test_every_chart_says_what_it_shows(pages):
    for name, make in (("gpu", gpu), ("hostile", hostile)):
        labels = [value for key, value in Reader(pages[name]).attributes if key == "aria-label"]
        assert {chart.says for chart in charts(make()) if chart.data} <= set(labels)


def test_every_number_has_its_provenance(pages):
    titles = Reader(pages["gpu"]).titles
    report = gpu()
    sources = [figure["source"] for figure in report["figures"].values()]
    sources += [row["source"] for key in ("phases", "terms", "kernels", "levers") for row in report[key]]
    for source in sources:
        assert any(source in title for title in titles), source
    rows = re.findall(r"<tr[^>]*>", pages["gpu"].split("<tbody>", 1)[1])
    numbers = [row for row in rows if "title=" in row]
    assert all("measured" in row or "modelled" in row or "quoted" in row or "unavailable" in row for row in numbers)
    assert len(numbers) > 100


def test_what_is_unavailable_or_in_doubt_is_said_where_it_stands(pages):
    assert re.search(r'class="tile unavailable"[^>]*title="MFU&#10;unavailable: no specification', pages["cpu"])
    assert "unavailable: no NVIDIA driver" in Reader(pages["cpu"]).text()
    assert 'id="absent-timeline"' in pages["cpu"]
    assert 'id="chart-timeline"' not in pages["cpu"]
    assert "7.1% of training is unexplained" in pages["cpu"].split("<h1>")[0].split("<header>")[1]
    markdown = render_markdown(cpu())
    assert markdown.index("7.1% of training") < markdown.index("Trained in 93.5 s")
    assert "IN DOUBT" not in pages["gpu"] + render_markdown(gpu())
    head = pages["cpu"].split('class="tiles"')[0]
    assert "INCOMPLETE" in head
    assert "trace incomplete: it ends early" in head
    assert "INCOMPLETE" in pages["empty"]
    assert "so the charts are not drawn" in re.search(r"<noscript>(.*?)</noscript>", pages["gpu"])[1]
    assert "measured: nine in ten took 2.81 to 2.93 ms" in Reader(pages["gpu"]).text()


def test_why_the_article_is_not_compared_with_is_said():
    report = gpu() | {"levers": [], "no_levers": "the images are synthetic"}
    assert "unavailable: the images are synthetic" in render_html(report)
    assert "Unavailable: the images are synthetic." in render_markdown(report)


@pytest.mark.parametrize(
    ("identity", "words"),
    [("synthetic", "SYNTHETIC"), ("copy", "COPY"), (None, "UNKNOWN"), ("<b>", "UNKNOWN")],
    ids=["synthetic", "copy", "not_known", "something_else"],
)
def test_the_identity_of_the_data_stands_at_the_head(identity, words):
    report = gpu()
    report["run"]["data_identity"] = identity
    assert words in render_html(report).split('class="tiles"')[0]
    assert data_warning(gpu()) is None


def test_more_kernels_than_thirty_fold_away(pages):
    shown, rest = pages["gpu"].split("<summary>14 more</summary>")
    assert shown.rsplit('<table class="kernels">', 1)[1].count("<tr") == 31
    assert rest.split("</table>", 1)[0].count("<tr") == 15

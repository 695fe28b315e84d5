"""report.html and report.md: what they say, how they are built, and what hostile names cannot do to them."""

import base64
import hashlib
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt  # what rich renders Markdown with
from report_sample import HOSTILE, hostile, strings

from profiling.output.forms import clean
from profiling.output.numbers import unavailable
from profiling.report import plot
from profiling.report.charts import charts
from profiling.report.html import HERE, assets, data_warning, head, render_html
from profiling.report.markdown import escape, grid, render_markdown

VOID = {"meta", "link", "img", "br", "hr", "input"}
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OURS = {"heading_open", "paragraph_open", "strong_open", "table_open", "blockquote_open", "ordered_list_open", "inline"}
OURS |= {"thead_open", "tbody_open", "tr_open", "th_open", "td_open", "bullet_list_open", "list_item_open", "text"}


class Reader(HTMLParser):
    """Elements in their nesting, the text outside of scripts and styles, and titles."""

    def __init__(self, page):
        super().__init__()
        self.page, self.open, self.elements, self.attributes, self.scripts, self.words = page, [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
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

    def values(self, *names):
        return [value for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def samples(reports):
    return reports | {"hostile": hostile(reports["whole"])}


@pytest.fixture(scope="module")
def pages(samples):
    return {name: Reader(render_html(report)) for name, report in samples.items()}


@pytest.fixture(scope="module")
def texts(samples):
    return {name: render_markdown(report) for name, report in samples.items()}


def kinds(markdown):
    tokens = PARSER.parse(markdown)
    tokens += [child for token in tokens for child in token.children or []]
    return Counter(token.type for token in tokens if not token.type.endswith("_close"))


def shown(markdown):
    """The visible text of one line."""
    (inline,) = [token for token in PARSER.parse(markdown) if token.type == "inline"]
    return "".join(child.content for child in inline.children)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_no_markup_anywhere(whole, name):
    words = HOSTILE[name]
    for escaped in (plot.escape(words), plot.clip(words, 99)):  # plotly reads HTML and templates
        assert "<" not in escaped.replace("<br>", "")
        assert "%{" not in escaped
    whole["terms"][0]["name"] = whole["kernels"][0]["name"] = words
    data = str(assets(charts(whole))["data"])  # it cannot end its script
    assert not set("<>&\u2028\u2029\0") & set(data)
    assert json.loads(data)[0]["key"] == "waterfall"
    words = clean(words)
    escaped = escape(words, 10_000)
    assert set(kinds(escaped)) == {"paragraph_open", "inline", "text"}
    assert shown(escaped) == " ".join(words.split()), "a reader sees what was written"
    assert "\n" not in escaped


def test_plotly_shows_a_hostile_name_as_it_was_written():
    for words in ("<b>x</b>", "&lt;script&gt;", "%{y}", "a<br>b"):
        seen = plot.escape(words)
        for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&#123;", "{"), ("&amp;", "&")):
            seen = seen.replace(entity, character)
        assert seen == words


def test_hostile_reports_have_the_elements_of_others_and_show_their_names(pages, texts, samples):
    page = pages["hostile"]
    assert set(page.elements) <= set(pages["whole"].elements) | set(pages["bare"].elements)
    assert not {name for name, _ in page.attributes if name.startswith("on")}
    for value in page.values("src", "href", "srcset", "action", "data", "poster"):
        assert value == "data:," or value.startswith("#"), value
    assert not re.search(r"url\(|@import", (HERE / "report.css").read_text())
    for words in (HOSTILE["script"], HOSTILE["image"], "{{ 7 * 7 }}{% raw %}"):
        assert words in page.text()
    assert not {"\0", "\u202e"} & set(page.page)
    for words in strings([[c.data, c.layout, c.narrow] for c in charts(samples["hostile"])]):
        assert not re.sub(r"</?[bi]>|<br>|<extra></extra>", "", words).count("<"), words
        assert not re.search(r"%\{(?!y:)", words), words
    assert max(len(chart.says) for chart in charts(samples["hostile"])) < 1500


@pytest.mark.parametrize("name", ["whole", "bare", "hostile"])
def test_pages_are_well_formed_and_always_the_same(pages, texts, samples, name):
    page, text = pages[name], texts[name]
    assert page.open == []
    assert page.elements.count("script") == 3
    assert page.elements.count("style") == page.elements.count("link") == 1
    assert len(page.page.encode()) < 6e6
    assert render_html(samples[name]) == page.page
    labels = page.values("aria-label")
    assert {chart.says for chart in charts(samples[name]) if chart.data} <= set(labels)
    assert render_markdown(samples[name]) == text
    found = kinds(text)
    assert set(found) <= OURS
    assert (found["heading_open"], found["strong_open"] <= 4) == (15, True)
    for above, below in itertools.pairwise(text.splitlines()):
        if above.startswith("|") and below.startswith("|"):
            bars = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in (above, below)]
            assert (bars[0], len(above)) == (bars[1], len(below))


def test_foreign_markup_in_markdown_would_be_found():
    assert "html_inline" in kinds("a <b>b</b>")
    assert "link_open" in kinds("[a](http://b)")


LINES = ["- item", "+ item", "1. item", "12) item", "# heading", "> quote", "---", "===", "* a *", "_a_ __b__", "~~a~~"]


@pytest.mark.parametrize("words", [*LINES, "&lt;"])
def test_a_line_that_would_be_something_else(words):
    assert set(kinds(escape(words))) == {"paragraph_open", "inline", "text"}
    assert shown(escape(words)) == words


def test_escaping_stops_what_github_adds_and_leaves_plain_words():
    for words in ("http://a.invalid", "HTTPS://a.invalid", "www.a.invalid", "a@b.invalid", "$x$"):
        assert words not in escape(words)
        assert shown(escape(words)) == words
    for words in ("conv_fprop_kernel", "3.2 TB/s", "-0.014", "a & b", "cifar::conv_fprop (x)", "50 %"):
        assert escape(words) == words
    assert escape("x" * 1000) == "x" * 159 + "…"


def test_a_table_lines_up():
    assert grid(["name", "time, s"], [["a", "1.25"]], {0}) == [
        "| name | time, s |",
        "| ---- | ------: |",
        "| a    |    1.25 |",
        "",
    ]


def test_only_its_own_scripts_may_run(pages):
    page = pages["whole"]
    policy = next(value for value in page.values("content") if "script-src" in value)
    assert policy.startswith("default-src 'none';")
    _, plotly, script = page.scripts
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, plotly)]
    assert re.search(r"script-src ([^;]*)", policy)[1].split() == [f"'sha256-{digest}'" for digest in digests]


def test_both_forms_say_what_the_report_says(pages, texts, samples):
    report, page, text = samples["whole"], pages["whole"].text(), " ".join(texts["whole"].split())
    for words in (report["headline"], report["assumption"], *report["sentences"]):
        assert " ".join(words.split()) in page
        assert " ".join(words.split()) in text
    for words in ("94.07", "0.794", "85.3", "nine in ten took 20 to 20 ms"):
        assert words in page
        assert words in text
    named = re.findall(r'<section id="(\w+)">\s*<h2>(.*?)</h2>', pages["whole"].page)
    nav = re.search(r"<nav.*?</nav>", pages["whole"].page)[0]
    assert re.findall(r'<a href="#(\w+)">(.*?)</a>', nav) == named
    assert [key for key, _ in named][:4] == ["account", "next", "phases", "roofline"]
    assert not re.search("INCOMPLETE|IN DOUBT|OF UNKNOWN", page + text)


def test_every_number_has_its_provenance(pages, texts, samples):
    report, titles = samples["whole"], pages["whole"].values("title")
    sources = [figure["source"] for figure in report["figures"].values()]
    sources += [row["source"] for key in ("phases", "terms", "kernels", "levers") for row in report[key]]
    for source in sources:
        assert any(source in title for title in titles), source
    for source in {term["source"] for term in report["terms"]}:
        assert escape(source) in texts["whole"]
    rows = re.findall(r"<tr[^>]*title=[^>]*>", pages["whole"].page.split("<tbody>", 1)[1])
    assert all(re.search("measured|modelled|quoted|unavailable", row) for row in rows)
    assert len(rows) > 30
    one = re.search(r"## Learning curve\n(.*?)##", texts["whole"], re.DOTALL)[1]
    assert "| source" not in one
    assert "Source: the timed run's log.jsonl." in one


def test_doubts_and_lacks_stand_at_the_head_and_reasons_in_their_places(whole, bare, pages, texts):
    whole["doubts"] = ["7.1% of training is unexplained, more than 5%"]
    whole["figures"]["mfu"] = unavailable("share", "no specification").to_json("MFU")
    whole |= {"levers": [], "no_levers": "the images are synthetic"}
    page, text = render_html(whole), render_markdown(whole)
    assert whole["doubts"][0] in page.split("<h1>")[0].split("<header>")[1]
    assert text.index(whole["doubts"][0]) < text.index("**2.02 s of training")
    assert re.search(r'class="tile unavailable"[^>]*title="MFU&#10;unavailable: no specification', page)
    assert "unavailable: the images are synthetic" in page
    assert "Unavailable: the images are synthetic." in text
    assert "- MFU: no specification" in text
    first = pages["bare"].page.split('class="tiles"')[0]
    for words in ("INCOMPLETE", "There is no trace of kernels."):
        assert words in first
        assert words in texts["bare"]
    assert "unavailable: the sampler left no file" in pages["bare"].text()
    assert "Unavailable: the sampler left no file." in texts["bare"]
    assert 'id="absent-timeline"' in pages["bare"].page
    assert 'id="chart-timeline"' not in pages["bare"].page
    assert "so the charts are not drawn" in re.search(r"<noscript>(.*?)</noscript>", pages["bare"].page)[1]


def test_the_run_and_the_identity_of_its_data_stand_at_the_head(whole):
    assert data_warning(whole) is None
    whole["run"]["date"] = None
    names = dict(head(whole))
    assert (names["git sha"], names["batch size"]) == ("0a1b0a1b0a1b", "512")
    assert "date" not in names
    said = {
        "synthetic": "SYNTHETIC IMAGES.",
        "copy": "A COPY OF",
        None: "OF UNKNOWN ORIGIN",
        "<b>": "OF UNKNOWN ORIGIN",
    }
    for identity, words in said.items():
        whole["run"]["data_identity"] = identity
        assert words in render_html(whole).split('class="tiles"')[0]
        assert words in render_markdown(whole)


def test_more_kernels_than_thirty_fold_away(whole):
    whole["kernels"] *= 12
    whole["terms"] *= 5
    page, text = render_html(whole), render_markdown(whole)
    first, rest = page.split("<summary>6 more</summary>")
    assert first.rsplit('<table class="kernels">', 1)[1].count("<tr") == 31
    assert rest.split("</table>", 1)[0].count("<tr") == 7
    assert "And 6 more, in report.json." in text
    assert text.split("## From ideal")[1].split("##")[0].count("\n| ") == 53, "no other table is cut"

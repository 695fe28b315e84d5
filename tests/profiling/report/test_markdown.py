import itertools
from collections import Counter

import pytest
from markdown_it import MarkdownIt  # what rich renders Markdown with
from report_sample import HOSTILE, HOSTILE_IDS, cpu, empty, gpu, hostile

from profiling.output.forms import clean
from profiling.report.markdown import escape, grid, render_markdown

SAMPLES = [gpu, cpu, empty, hostile]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OURS = {"heading_open", "paragraph_open", "strong_open", "table_open", "blockquote_open", "ordered_list_open", "inline"}
OURS |= {"thead_open", "tbody_open", "tr_open", "th_open", "td_open", "bullet_list_open", "list_item_open", "text"}


def kinds(markdown):
    tokens = PARSER.parse(markdown)
    tokens += [child for token in tokens for child in token.children or []]
    return Counter(token.type for token in tokens if not token.type.endswith("_close"))


def shown(markdown):
    """What a reader sees of one line."""
    (inline,) = [token for token in PARSER.parse(markdown) if token.type == "inline"]
    return "".join(child.content for child in inline.children)


@pytest.mark.parametrize("make", SAMPLES, ids=lambda make: make.__name__)
def test_there_is_no_markup_but_our_own(make):
    text = render_markdown(make())
    assert render_markdown(make()) == text
    found = kinds(text)
    assert set(found) <= OURS
    assert found["heading_open"] == 15
    assert found["strong_open"] <= 4


def test_foreign_markup_would_be_found():
    assert "html_inline" in kinds("a <b>b</b>")
    assert "link_open" in kinds("[a](http://b)")


@pytest.mark.parametrize("words", HOSTILE, ids=HOSTILE_IDS)
def test_what_a_reader_sees_is_what_was_written(words):
    words = clean(words)
    escaped = escape(words, 10_000)
    assert set(kinds(escaped)) == {"paragraph_open", "inline", "text"}
    assert shown(escaped) == " ".join(words.split())
    assert "\n" not in escaped


LINES = [
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "# heading",
    "> quote",
    "---",
    "===",
    "* a *",
    "_a_ __b__",
    "~~a~~",
    "&lt;",
]


@pytest.mark.parametrize("words", LINES)
def test_a_line_that_would_be_something_else(words):
    assert set(kinds(escape(words))) == {"paragraph_open", "inline", "text"}
    assert shown(escape(words)) == words


@pytest.mark.parametrize("words", ["http://a.invalid", "HTTPS://a.invalid", "www.a.invalid", "a@b.invalid", "$x$"])
def test_what_github_adds_to_markdown_finds_nothing(words):
    assert words not in escape(words)
    assert shown(escape(words)) == words


@pytest.mark.parametrize("words", ["conv_fprop_kernel", "3.2 TB/s", "-0.014", "a & b", "cifar::conv_fprop (x)", "50 %"])
def test_plain_words_stay_readable(words):
    assert escape(words) == words


def test_long_names_are_cut():
    assert escape("x" * 1000) == "x" * 159 + "…"


def test_a_table_lines_up():
    head, rule, row, _ = grid(["name", "time, s"], [["a", "1.25"]], {0})
    assert head == "| name | time, s |"
    assert rule == "| ---- | ------: |"
    assert row == "| a    |    1.25 |"
    assert grid(["name"], [], {0}) == []


@pytest.mark.parametrize("make", [gpu, hostile], ids=["gpu", "hostile"])
def test_tables_are_rectangular(make):
    lines = render_markdown(make()).splitlines()
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            bars = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in (above, below)]
            assert bars[0] == bars[1]
            assert len(above) == len(below)


def test_it_says_what_the_report_says():
    report, markdown = gpu(), render_markdown(gpu())
    for words in (report["headline"], report["assumption"], *report["sentences"]):
        assert words in markdown
    for words in ("94.07 %", "31.43", "\N{MINUS SIGN}0.014", "And 14 more", "DRAM traffic: Nsight Compute", "26.3"):
        assert words in markdown, words
    for source in {term["source"] for term in report["terms"]}:
        assert source in markdown


def test_sources_that_differ_have_a_column():
    report = gpu()
    report["terms"][0]["source"] = "the data sheet"
    table = render_markdown(report).split("## From ideal to measured")[1].split("##")[0]
    assert "| source" in table
    assert "the data sheet" in table


def test_what_is_missing_is_said():
    markdown = render_markdown(cpu())
    assert "INCOMPLETE" in markdown
    assert "> - trace incomplete: it ends early" in markdown
    assert "SYNTHETIC IMAGES" in markdown
    assert "Unavailable: no NVIDIA driver." in markdown
    assert "INCOMPLETE" not in render_markdown(gpu())

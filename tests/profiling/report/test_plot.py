import re

import pytest

from profiling.report.html import HERE
from profiling.report.plot import PAINT, clip, escape


@pytest.mark.parametrize(
    "hostile",
    ["<b>x</b>", "<a href='javascript:alert(1)'>x</a>", "&lt;script&gt;", "%{y}", "a<br>b"],
    ids=["tag", "link", "entity", "template", "line_break"],
)
def test_a_text_is_no_markup_and_no_template(hostile):
    for escaped in (escape(hostile), clip(hostile, 99)):
        assert "<" not in escaped
        assert "%{" not in escaped
        # plotly decodes these entities again: what is seen is what was written
        decoded = escaped.replace("&lt;", "<").replace("&gt;", ">").replace("&#123;", "{").replace("&amp;", "&")
        assert decoded == hostile


def test_long_texts_are_broken_and_cut():
    lines = escape("word " * 200).split("<br>")
    assert len(lines) > 3
    assert max(map(len, lines)) <= 52
    assert sum(map(len, lines)) <= 300
    assert clip("abcdef", 4) == "abc…"
    assert clip("abcd", 4) == "abcd"


def test_every_colour_of_a_term_is_in_the_style_sheet_twice():
    """In light and in dark."""
    css = (HERE / "report.css").read_text()
    for name in {*PAINT.values(), "other", "total"}:
        assert len(re.findall(rf"--term-{name}:", css)) == 2, name

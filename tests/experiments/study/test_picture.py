import re
from xml.etree import ElementTree

import pytest

from profiling import ROOT

pytest.importorskip("matplotlib")

from experiments.study import picture
from profiling.report.plot import Chart, axis, layout, trace

DOCS = ROOT / "docs"


def chart(*data, **properties) -> Chart:
    axes = {"xaxis": axis("x"), "yaxis": axis("y"), **properties}
    return Chart("sample", "a sample", 300, list(data), layout(**axes))


def line(**more) -> dict:
    return trace("scatter", x=[1, 10, 100], y=[3.0, None, 2.0], mode="lines+markers", **more)


BARS = trace(
    "bar",
    x=[5.0, -2.0],
    y=[0, 1],
    orientation="h",
    marker={"color": ["var(--series-1)", "rgba(0, 0, 0, 0.5)"]},
    error_x={"type": "data", "array": [1.0, 1.0], "arrayminus": [0.5, 0.5]},
)
CHARTS = {
    "lines": chart(line(line={"color": "var(--series-1)", "dash": "dot"}), line(marker={"color": ["red"] * 3})),
    "bars": chart(BARS, yaxis=axis("", tickvals=[0, 1], ticktext=["a<br>b", "$5 & more"], range=[1.6, -0.6])),
    "band": chart(line(), line(fill="tonexty", fillcolor="rgba(20, 40, 80, 0.1)")),
    "log_axes": chart(line(), xaxis=axis("x", type="log", range=[0, 2]), yaxis=axis("y", tickformat=".0%")),
    "words": chart(trace("scatter", x=[1], y=[1], mode="text", text=["<b>here</b>"], textposition="top right")),
    "notes": chart(
        line(name="one", showlegend=True),
        shapes=[
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 2, "y1": 2, "line": {"color": "var(--faint)"}}
        ],
        annotations=[{"text": "limit", "x": 1, "y": 2, "xref": "paper", "font": {"color": "var(--ink)"}}],
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_the_same_chart_makes_the_same_files(name, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture.save(CHARTS[name], "A title", tmp_path / folder / "chart.v1")
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / folder / f"chart.v1.{suffix}").read_bytes() for folder in ("a", "b"))
        assert first == second
        assert len(first) > 1000


def svg(name: str, folder) -> ElementTree.Element:
    picture.save(CHARTS[name], "Time & <loss>", folder / "chart", "Five of 7 < 9 & more.")
    return ElementTree.parse(folder / "chart.svg").getroot()


def test_a_picture_can_be_read_aloud_searched_and_copied(tmp_path):
    """It is an image with a title and a description, and its words are text."""
    name = "{http://www.w3.org/2000/svg}"
    root = svg("bars", tmp_path)
    assert root.get("role") == "img"
    assert [root.findtext(f"{name}{tag}") for tag in ("title", "desc")] == ["Time & <loss>", "Five of 7 < 9 & more."]
    texts = {text.text for text in root.iter(f"{name}text")}
    assert {"Time & <loss>", "a", "b", "$5 & more", "x"} <= texts


# The README's waterfall is the report's own chart, a picture for each scheme.
OF_EXPERIMENTS = sorted(path for path in DOCS.glob("*.svg") if not path.stem.startswith("waterfall"))


@pytest.mark.parametrize("path", OF_EXPERIMENTS, ids=lambda path: path.name)
def test_the_document_s_pictures_are_such_ones(path):
    drawn, name = path.read_text(), "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(drawn)
    assert all(root.findtext(f"{name}{tag}") for tag in ("title", "desc"))
    assert root.findtext(f"{name}title") in [text.text for text in root.iter(f"{name}text")]
    assert "prefers-color-scheme: dark" in drawn


@pytest.mark.parametrize("name", CHARTS)
def test_a_picture_is_dark_where_its_reader_prefers_that(name, tmp_path):
    """Each of the page's colours in it has the page's dark one, paper and words among them."""
    svg(name, tmp_path)
    drawn = (tmp_path / "chart.svg").read_text()
    style, rest = re.fullmatch(r"(?s).*prefers-color-scheme: dark\) \{(.*)\}</style>(.*)", drawn).groups()
    light, dark = picture._palette(), picture._palette("dark")
    of = {f"{paint}: {light[key]}": f"{paint}: {dark[key]}" for key in dark for paint in ("fill", "stroke")}
    used = {plain: instead for plain, instead in of.items() if plain in rest}
    assert {"fill: #ffffff", "fill: #15181d", "fill: #525965", "stroke: #e2e5ea"} <= used.keys()
    for plain, instead in used.items():
        assert f'[style*="{plain}"] {{ {instead} !important }}' in style


def test_no_word_touches_the_picture_s_edge():
    names = {"tickvals": [0, 1], "ticktext": ["a name that is long", "another"], "range": [1.6, -0.6]}
    figure = picture.draw(chart(BARS, yaxis=axis("", **names)), "A title")
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0.1


def test_a_gap_before_a_word_is_kept():
    """SVG drops spaces at the front of a text."""
    assert picture.words("  5 $") == "\u00a0\u00a05 \\$"


def test_axes_are_the_chart_s():
    drawn = picture.draw(CHARTS["log_axes"], "t").axes[0]
    assert drawn.get_xscale() == "log"
    assert drawn.get_xlim() == (1, 100)
    assert drawn.get_ylabel() == "y"
    bars = picture.draw(CHARTS["bars"], "t").axes[0]
    assert bars.get_ylim() == (1.6, -0.6)
    assert [label.get_text() for label in bars.get_yticklabels()] == ["a\nb", r"\$5 & more"]
    assert [patch.get_width() for patch in bars.patches] == [5.0, -2.0]


def test_a_legend_is_of_the_traces_that_ask_for_a_place():
    legend = picture.draw(CHARTS["notes"], "t").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["one"]
    assert picture.draw(CHARTS["lines"], "t").axes[0].get_legend() is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("var(--series-1)", "#0a5ccf"),
        ("rgba(255, 0, 0, 0.5)", (1.0, 0.0, 0.0, 0.5)),
        ("rgb(0,0,255)", (0.0, 0.0, 1.0, 1.0)),
        ("red", "red"),
        (None, "#15181d"),
    ],
    ids=["variable", "rgba", "rgb", "name", "none"],
)
def test_colours_are_the_page_s_light_ones(name, expected):
    assert picture.colour(name) == expected


def test_faint_points_are_faint():
    faint = picture.draw(chart(line(opacity=0.35), line()), "t").axes[0].lines
    assert [drawn.get_alpha() for drawn in faint] == [0.35, None]


def test_a_kind_of_trace_that_is_not_drawn_is_refused():
    with pytest.raises(ValueError, match="'pie'"):
        picture.draw(chart(trace("pie", values=[1])), "t")

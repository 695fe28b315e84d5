from xml.etree import ElementTree

import pytest

from experiments.study import drawing
from profiling import ROOT

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"


def fill(axes) -> None:
    axes.barh([0, 1], [5.0, -2.0], xerr=[[0.5, 0.5], [1.0, 1.0]], color=drawing.BAR, label="bars")
    axes.plot([1], [1], "D", color=drawing.ORANGE)
    axes.set_yticks([0, 1], ["a name that is long", "$5 & more$"])


PLOT = drawing.Plot("sample.v1", "Time & <loss>", fill, "Five of 7 < 9 & more.")


def test_a_picture_is_reproducible_text_with_a_description_and_dark_colours(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    svg, again = (drawing.save(PLOT, tmp_path / folder) for folder in ("a", "b"))
    assert svg == again == (tmp_path / "a" / "sample.v1.svg").read_text()
    png = (tmp_path / "a" / "sample.v1.png").read_bytes()
    assert png == (tmp_path / "b" / "sample.v1.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert [root.findtext(f"{SVG}{tag}") for tag in ("title", "desc")] == ["Time & <loss>", "Five of 7 < 9 & more."]
    assert {"Time & <loss>", "$5 & more$", "bars"} <= {text.text for text in root.iter(f"{SVG}text")}
    assert not [group for group in root.iter(f"{SVG}g") if group.get("id")]  # a page has several pictures
    style, rest = svg.split("@media screen and (prefers-color-scheme: dark) {")[1].split("</style>")
    used = [(f"{p}: {a}", f"{p}: {b}") for p in ("fill", "stroke") for a, b in drawing.COLOURS.values()]
    used = [(light, dark) for light, dark in used if light in rest]
    assert {"fill: #ffffff", "fill: #15181d", "fill: #525965", "stroke: #e2e5ea", "fill: #3d7ed4"} <= dict(used).keys()
    assert all(f'[style*="{light}"] {{ {dark} !important }}' in style for light, dark in used)


def test_no_word_touches_the_edge_and_a_legend_names_only_what_has_a_label():
    figure = drawing.figure(PLOT)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0.1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bars"]
    assert not drawing.figure(drawing.Plot("k", "T", lambda axes: axes.plot([1, 2]))).legends


# The waterfall is the report's own chart, a picture for each scheme.
@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "docs").glob("*.svg") if not p.stem.startswith("waterfall")), ids=lambda p: p.name
)
def test_pictures_of_the_documents_describe_themselves_and_are_dark_too(path):
    drawn = path.read_text()
    root = ElementTree.fromstring(drawn)
    assert all(root.findtext(f"{SVG}{tag}") for tag in ("title", "desc"))
    assert root.findtext(f"{SVG}title") in [text.text for text in root.iter(f"{SVG}text")]
    assert "prefers-color-scheme: dark" in drawn

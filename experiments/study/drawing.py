"""The experiments' pictures, drawn by matplotlib in one style: the same SVG for a page and for a document.

An SVG keeps its words as text, has a title and a description, and is dark on a screen that prefers dark colours.
matplotlib is optional, so only what draws imports it.
"""

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "paper": ("#ffffff", "#14161a"),
    "ink": ("#15181d", "#e9ebef"),
    "soft": ("#525965", "#a9afba"),
    "rule": ("#e2e5ea", "#2d3139"),
    "blue": ("#0a5ccf", "#78aeff"),
    "bar": ("#3d7ed4", "#4f85d3"),
    "orange": ("#bb6a1d", "#e09a52"),
    "violet": ("#6f5fa8", "#a99be0"),
    "grey": ("#767d89", "#98a0ac"),
    "warn": ("#9a3412", "#f3a46c"),
}
"""(light, dark) of each colour of pictures and pages."""
PAPER, INK, SOFT, RULE, BLUE, BAR, ORANGE, VIOLET, GREY, WARN = (light for light, _ in COLOURS.values())
WIDTH_IN, PAD_IN, DPI = 7.6, 0.12, 180
STYLE = {
    "svg.hashsalt": "experiments",  # the same picture makes the same file
    "svg.fonttype": "none",  # words can be found, copied and read aloud
    "text.parse_math": False,  # a dollar sign is one
    "text.color": INK,
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # a reader without the first has the others
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.borderaxespad": 1,
    "legend.fontsize": 8.5,
    "legend.labelcolor": SOFT,
    "errorbar.capsize": 2.5,
}


@dataclass(frozen=True)
class Plot:
    """A picture for the page, OUT/key.svg and OUT/key.png: `draw` fills its axes.

    `caption` stands below it, and is the SVG's `desc`. With a `reason` why there is nothing to draw, it is not drawn.
    """

    key: str
    title: str
    draw: Callable[["Axes"], Any]
    caption: str = ""
    height_in: float = 4.5
    reason: str = ""


def figure(plot: Plot) -> "Figure":
    """The picture in light colours, its legend below the axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH_IN, plot.height_in), layout="constrained")
        drawn.get_layout_engine().set(w_pad=PAD_IN, h_pad=PAD_IN)
        axes = drawn.add_subplot()
        axes.set_title(plot.title)
        plot.draw(axes)
        if axes.get_legend_handles_labels()[1]:
            drawn.legend(loc="outside lower left", ncols=2)
        return drawn


def save(plot: Plot, folder: Path) -> str:
    """Write the picture as SVG and, in light colours, as PNG; returns the SVG."""
    import matplotlib

    drawn, written = figure(plot), io.StringIO()
    with matplotlib.rc_context(STYLE):
        drawn.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Title": plot.title})
        drawn.savefig(folder / f"{plot.key}.png", dpi=DPI, metadata={"Software": None})
    svg = _described(written.getvalue(), plot.caption)
    (folder / f"{plot.key}.svg").write_text(svg, encoding="utf-8")
    return svg


def _described(svg: str, caption: str) -> str:
    """matplotlib's SVG as an image with a description and dark colours, and fit to stand in a page beside others."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and another picture has the same
    described = f"</title>\n <desc>{html.escape(caption, quote=False)}</desc>"
    svg = svg.replace("<svg ", '<svg role="img" ', 1).replace("</title>", described, 1)
    rules = [
        f'[style*="{paint}: {light}"] {{ {paint}: {dark} !important }}'
        for light, dark in COLOURS.values()
        for paint in ("fill", "stroke")
        if f"{paint}: {light}" in svg
    ]
    dark = "\n".join(["@media screen and (prefers-color-scheme: dark) {", *rules, "}"])
    return svg.replace("</style>", f"\n{dark}</style>", 1)

"""A chart of the page as a static picture, drawn by matplotlib: lines, markers, bars and bands on one pair of axes.

A chart is plotly's data (`profiling.report.plot`). Read here is the part of it that the experiments draw: traces
`scatter` and `bar` with error bars, `fill: tonexty`, linear and log axes, shapes that are lines, annotations, a legend.

The SVG has text as text, a title and a description, and takes the page's dark colours where its reader prefers them.
"""

import functools
import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from profiling.report import html as page
from profiling.report.plot import Chart

WIDTH_IN, PAD_IN, DPI = 9.0, 0.12, 150
RC = {
    "svg.hashsalt": "experiments",
    "svg.fonttype": "none",  # text that can be found, copied and read aloud
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first is drawn by; a reader without it has the others
}
DASHES = {"solid": "-", "dot": ":", "dash": "--", "dashdot": "-."}
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "triangle-up": "^", "star": "*"}
VERTICAL = {"top": "bottom", "middle": "center", "bottom": "top"}
HORIZONTAL = {"left": "right", "center": "center", "right": "left"}


def save(chart: Chart, title: str, stem: Path, caption: str = "") -> None:
    """Write `stem`.svg and, in the page's light colours, `stem`.png. The same chart makes the same files."""
    with matplotlib.rc_context(RC):
        figure, drawn = draw(chart, title), io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
        stem.with_name(f"{stem.name}.svg").write_text(_described(drawn.getvalue(), caption), encoding="utf-8")
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=DPI, metadata={"Software": None})


def _described(svg: str, caption: str) -> str:
    """matplotlib's SVG as an image with the caption as its description, and with dark colours."""
    described = f"</title>\n <desc>{html.escape(caption, quote=False)}</desc>" if caption else "</title>"
    svg = svg.replace("<svg ", '<svg role="img" ', 1).replace("</title>", described, 1)
    return svg.replace("</style>", f"\n{_dark_rules(svg)}</style>", 1)


def _dark_rules(svg: str) -> str:
    """The page's dark colours for the light ones that are in the picture, as a rule each.

    The light ones stay in the elements' own styles, for programs that know no media queries.
    """
    light, dark = _palette(), _palette("dark")
    found = {(p, light[name], dark[name]) for name in dark for p in ("fill", "stroke") if f"{p}: {light[name]}" in svg}
    rules = [f'[style*="{p}: {bright}"] {{ {p}: {dim} !important }}' for p, bright, dim in sorted(found)]
    return "\n".join(["@media (prefers-color-scheme: dark) {", *rules, "}"])


def draw(chart: Chart, title: str) -> Figure:
    """The figure; raises ValueError for a kind of trace that this does not draw."""
    paper, height = colour("var(--paper)"), max(chart.height, 200) / 100 + 0.4
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained", facecolor=paper)
    figure.get_layout_engine().set(w_pad=PAD_IN, h_pad=PAD_IN)
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left", color=colour("var(--ink)"), fontsize=11, fontweight="bold")
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(colour("var(--soft)"))
    for name in ("x", "y"):
        _axis(axes, name, chart.layout.get(f"{name}axis", {}), before=True)
    lower = None
    for order, trace in enumerate(chart.data):
        if trace["type"] == "scatter":
            _scatter(axes, trace, lower, order)
            lower = trace
        elif trace["type"] == "bar":
            _bars(axes, trace, order)
        else:
            raise ValueError(f"a trace of type {trace['type']!r} cannot be drawn; expected scatter or bar")
    for name in ("x", "y"):
        _axis(axes, name, chart.layout.get(f"{name}axis", {}), before=False)
    for shape in chart.layout.get("shapes", ()):
        _line(axes, shape)
    for note in chart.layout.get("annotations", ()):
        _annotation(axes, note)
    if any(trace.get("showlegend") for trace in chart.data):
        axes.legend(frameon=False, fontsize=8, labelcolor=colour("var(--soft)"))
    return figure


@functools.cache
def _palette(scheme: str = "light") -> dict[str, str]:
    css = (page.HERE / "report.css").read_text(encoding="utf-8")
    light, dark, *_ = re.findall(r":root[^{]*\{([^}]*)\}", css)
    return dict(re.findall(r"--([\w-]+):\s*([^;]+);", light if scheme == "light" else dark))


def colour(name: str | None) -> Any:
    """matplotlib's word for a colour of the page: `var(--name)`, `rgba(...)` or one that both know."""
    if name is None:
        return _palette()["ink"]
    variable = re.fullmatch(r"var\(--([\w-]+)\)", name)
    name = _palette()[variable.group(1)] if variable else name
    parts = re.fullmatch(r"rgba?\(([^)]*)\)", name)
    if not parts:
        return name
    red, green, blue, *alpha = (float(part) for part in parts.group(1).split(","))
    return (red / 255, green / 255, blue / 255, alpha[0] if alpha else 1.0)


def words(markup: str) -> str:
    """A text of plotly's without its markup; a dollar sign is one, and spaces at the front keep their width."""
    plain = html.unescape(re.sub(r"<[^>]+>", "", markup.replace("<br>", "\n")))
    indent = len(plain) - len(plain.lstrip(" "))
    return "\u00a0" * indent + plain[indent:].replace("$", r"\$")


def _axis(axes: Axes, name: str, spec: dict[str, Any], before: bool) -> None:
    """Scale before the traces; limits, ticks and titles after them."""
    if before:
        if spec.get("type") == "log":
            getattr(axes, f"set_{name}scale")("log")
        return
    axis, log = getattr(axes, f"{name}axis"), spec.get("type") == "log"
    title = spec.get("title", {})
    getattr(axes, f"set_{name}label")(
        words(title if isinstance(title, str) else title.get("text", "")), color=colour("var(--soft)")
    )
    if "range" in spec:
        low, high = spec["range"]
        getattr(axes, f"set_{name}lim")(*((10**low, 10**high) if log else (low, high)))
    if "tickvals" in spec:
        axis.set_ticks(spec["tickvals"], [words(str(text)) for text in spec.get("ticktext", spec["tickvals"])])
        axis.set_minor_locator(NullLocator())
    elif "%" in spec.get("tickformat", ""):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif log:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    if not spec.get("showticklabels", True):
        axis.set_ticklabels([])
    axes.tick_params(axis=name, colors=colour("var(--soft)"), labelsize=8)
    if spec.get("showgrid", True):
        axes.grid(True, axis=name, color=colour("var(--rule)"), linewidth=0.6)
    axes.set_axisbelow(True)


def _errors(spec: dict[str, Any] | None) -> Any:
    """(below, above) of plotly's error bars."""
    if not spec or not spec.get("visible", True):
        return None
    above = spec["array"]
    return [spec.get("arrayminus", above), above]


def _label(trace: dict[str, Any]) -> str:
    return words(trace.get("name", "")) if trace.get("showlegend") else "_nolegend_"


def _scatter(axes: Axes, trace: dict[str, Any], lower: dict[str, Any] | None, order: int) -> None:
    mode, line, marker = trace.get("mode", "lines"), trace.get("line", {}), trace.get("marker", {})
    x, y = _numbers(trace["x"]), _numbers(trace["y"])
    if trace.get("fill") == "tonexty" and lower is not None:
        axes.fill_between(
            x, _numbers(lower["y"]), y, color=colour(trace.get("fillcolor")), linewidth=0, zorder=2 + 0.01 * order
        )
    if "lines" in mode or "markers" in mode:
        colours = marker.get("color", line.get("color"))
        many = isinstance(colours, list)
        drawn = colour(line.get("color") or (None if many else colours))
        symbol = marker.get("symbol", "circle")
        axes.errorbar(
            x,
            y,
            xerr=_errors(trace.get("error_x")),
            yerr=_errors(trace.get("error_y")),
            label=_label(trace),
            color=drawn,
            linewidth=line.get("width", 1.5) if "lines" in mode else 0,
            linestyle=DASHES.get(line.get("dash", "solid"), "-") if "lines" in mode else "none",
            marker=SYMBOLS.get(symbol if isinstance(symbol, str) else "circle", "o") if "markers" in mode else None,
            markersize=_first(marker.get("size", 6)) * 0.75,
            markerfacecolor=drawn if many else colour(colours),
            elinewidth=1.2,
            capsize=2.5,
            alpha=trace.get("opacity"),
            zorder=3 + 0.01 * order,
        )
        if many and "markers" in mode:
            axes.scatter(x, y, c=[colour(one) for one in colours], s=18, zorder=4 + 0.01 * order)
    if "text" in mode:
        vertical, _, horizontal = trace.get("textposition", "middle center").partition(" ")
        for px, py, text in zip(x, y, trace["text"], strict=True):
            if py == py:
                axes.text(
                    px,
                    py,
                    words(str(text)),
                    va=VERTICAL.get(vertical, "center"),
                    ha=HORIZONTAL.get(horizontal, "center"),
                    color=colour(trace.get("textfont", {}).get("color")),
                    fontsize=8,
                    clip_on=trace.get("cliponaxis", True),
                    zorder=5,
                )


def _numbers(values: list[Any]) -> list[Any]:
    """A gap where there is None."""
    return [float("nan") if value is None else value for value in values]


def _first(value: Any) -> float:
    return value[0] if isinstance(value, list) else value


def _bars(axes: Axes, trace: dict[str, Any], order: int) -> None:
    flat = trace.get("orientation") == "h"
    lengths = [0 if value is None else value for value in (trace["x"] if flat else trace["y"])]
    places = trace["y"] if flat else trace["x"]
    offset, width = trace.get("offset"), trace.get("width", 0.8)
    colours = trace.get("marker", {}).get("color")
    many = isinstance(colours, list)
    properties = {
        "color": [colour(one) for one in colours] if many else colour(colours),
        "label": _label(trace),
        "align": "center" if offset is None else "edge",
        "ecolor": colour("var(--ink)"),
        "capsize": 2.5,
        "error_kw": {"elinewidth": 1.2},
        "zorder": 2 + 0.01 * order,
    }
    if offset is not None:
        places = [place + offset for place in places]
    base = trace.get("base", 0)
    if flat:
        axes.barh(places, lengths, height=width, left=base, xerr=_errors(trace.get("error_x")), **properties)
    else:
        axes.bar(places, lengths, width=width, bottom=base, yerr=_errors(trace.get("error_y")), **properties)


def _line(axes: Axes, shape: dict[str, Any]) -> None:
    """A shape of type line, its ends in data or, with xref or yref paper, in shares of the axes."""
    line = shape.get("line", {})
    transform = axes.transData
    if shape.get("xref") == "paper" and shape.get("yref") != "paper":
        transform = axes.get_yaxis_transform()
    elif shape.get("yref") == "paper" and shape.get("xref") != "paper":
        transform = axes.get_xaxis_transform()
    elif shape.get("xref") == "paper":
        transform = axes.transAxes
    axes.plot(
        [shape["x0"], shape["x1"]],
        [shape["y0"], shape["y1"]],
        transform=transform,
        color=colour(line.get("color")),
        linewidth=line.get("width", 1),
        linestyle=DASHES.get(line.get("dash", "solid"), "-"),
        scalex=False,
        scaley=False,
    )


def _annotation(axes: Axes, note: dict[str, Any]) -> None:
    """A note's text; on a log axis plotly wants the logarithm of its place."""
    across, up = note.get("xref") == "paper", note.get("yref") == "paper"
    x, y = note["x"], note["y"]
    x = 10**x if not across and axes.get_xscale() == "log" else x
    y = 10**y if not up and axes.get_yscale() == "log" else y
    transform = {
        (False, False): axes.transData,
        (True, False): axes.get_yaxis_transform(),
        (False, True): axes.get_xaxis_transform(),
        (True, True): axes.transAxes,
    }[across, up]
    axes.text(
        x,
        y,
        words(note["text"]),
        transform=transform,
        color=colour(note.get("font", {}).get("color", "var(--soft)")),
        ha={"left": "left", "right": "right"}.get(note.get("xanchor", ""), "center"),
        va={"top": "top", "bottom": "bottom"}.get(note.get("yanchor", ""), "center"),
        fontsize=8,
    )
